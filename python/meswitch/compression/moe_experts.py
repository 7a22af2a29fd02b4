"""Statistics of single MoE experts, over the rows that a gate sends to each: second moments, and the cost of errors.

A MoE expert that few tokens reach is not known well, so its statistics are shrunk towards those of all MoE experts of
its stack: as if it had read some more rows, of the stack's mean. One that no token reaches has the mean itself, and
costs what a MoE expert costs that is reached once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MOMENT_ROWS = 16  # rows of the stack's mean that are added to each MoE expert's second moments
_COST_ROWS = 1  # rows of the stack's mean cost that are added to each MoE expert's


@dataclass
class RoutedMoments:
    """Σ x² of the rows that each MoE expert of a stack reads.

    `squares float64 [MoE experts, in_features]`; `rows int64 [MoE experts]`: how many rows these are. `shared_input`:
    whether input channels mean the same in all MoE experts, as those of a block's input do and inner ones do not.
    """

    squares: Tensor
    rows: Tensor
    shared_input: bool

    @classmethod
    def of(cls, count: int, in_features: int, *, shared_input: bool) -> RoutedMoments:
        """Empty sums for a stack of `count` MoE experts."""
        squares = torch.zeros(count, in_features, dtype=torch.float64)
        return cls(squares, torch.zeros(count, dtype=torch.int64), shared_input)

    def add(self, moe_expert: int, x: Tensor) -> None:
        """Adds rows `x [n, in_features]` of a MoE expert."""
        self.squares[moe_expert] += x.float().square().sum(0, dtype=torch.float64)
        self.rows[moe_expert] += len(x)

    def mean(self) -> Tensor:
        """E[x²] of all rows, `float32 [in_features]`."""
        return (self.squares.sum(0) / self.rows.sum().clamp_min(1)).float()

    def means(self) -> Tensor:
        """E[x²] of each MoE expert's rows and of 16 more of the mean, `float32 [MoE experts, in_features]`.

        That mean is the stack's, by channel where the input is shared.
        """
        mean = self.squares.sum(0) / self.rows.sum().clamp_min(1)
        mean = mean if self.shared_input else mean.mean().expand_as(mean)
        rows = self.rows[:, None] + _MOMENT_ROWS
        return ((self.squares + _MOMENT_ROWS * mean) / rows).float()


@dataclass
class RoutedCosts:
    """What errors in each row of a stack's MoE experts cost, summed over windows of text as `sensitivity` does.

    `products float64 [MoE experts, out_features]`: Σ over windows and input channels of (Σ g·x)². `inputs float64
    [MoE experts]`: Σ x² over rows and channels. `rows int64 [MoE experts]`: the rows that were routed.
    """

    products: Tensor
    inputs: Tensor
    rows: Tensor

    @classmethod
    def of(cls, count: int, out_features: int) -> RoutedCosts:
        """Empty sums for a stack of `count` MoE experts."""
        products = torch.zeros(count, out_features, dtype=torch.float64)
        return cls(products, torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64))

    def sensitivities(self, tokens: int) -> Tensor:
        """The sensitivity of each row, `float64 [MoE experts, out_features]`, over `tokens` tokens.

        Of moments over the rows that a MoE expert reads, so it holds the share of the tokens that reach it.
        """
        total = self.rows.sum().clamp_min(1)
        products = self.products + _COST_ROWS * self.products.sum() / total / self.products.shape[1]
        rows = self.rows + _COST_ROWS
        moments = (self.inputs + _COST_ROWS * self.inputs.sum() / total) / rows
        return products / (2 * tokens * moments.clamp_min(1e-300)[:, None])
