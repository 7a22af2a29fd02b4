"""Native kernels on the CPU: the base's product, and what deltas add to it, at the speed of memory.

Which product is taken is decided here, for each module and step:

    one expert has 64 tokens or more     base and delta merged, a tile at a time, and multiplied by torch (prefill)
    few tokens, weights of 16 bits       base and deltas in one fused native call (decode), also for the modules that
    or packed                            last took the same input right after this one (q, k and v; gate and up)
    otherwise                            the base module as it is, or a packed one a tile at a time, then the deltas

The operations themselves are in `products.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.kernels.products import (
    FUSED_TOKENS,
    DeltaTable,
    Weight,
    can_merge,
    delta_embedding,
    delta_linear,
    exact_product,
    fused_linear,
    has_fused_kernel,
    merged_linear,
)
from meswitch.kernels.rows import Rows
from meswitch.kernels.shared_input import SharedInput
from meswitch.site import DeltaSite

MERGE_TOKENS = 64
"""From so many tokens of one expert on, one product with base and delta merged is quicker than one with each."""


class CpuKernels:
    """The backend for models on the CPU."""

    name = "cpu"

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact
        self.shared_input = SharedInput()

    def linear(
        self,
        module: nn.Module,
        forward: Callable[..., Tensor],
        out_features: int,
        in_features: int,
        *,
        many_rows: bool,
        packed: DeltaSite | None = None,
    ) -> CpuLinear:
        if packed is not None:
            return PackedLinear(self, module, packed, many_rows=many_rows)
        return CpuLinear(self, module, forward, out_features, in_features, many_rows=many_rows)

    def embedding(self, rows: int, width: int, packed: DeltaSite | None = None) -> CpuEmbedding:
        return CpuEmbedding(rows, width, packed)

    def settle(self) -> None:
        pass  # a delta is there as soon as it is set


class CpuLinear(DeltaTable):
    """A linear module of the base with the deltas of its weight."""

    def __init__(
        self,
        kernels: CpuKernels,
        module: nn.Module,
        forward: Callable[..., Tensor],
        out_features: int,
        in_features: int,
        *,
        many_rows: bool,
        packed: DeltaSite | None = None,
    ) -> None:
        super().__init__(out_features, in_features, packed)
        self._kernels, self._module, self._forward = kernels, module, forward
        plain = not kernels.exact and type(module) is nn.Linear and "forward" not in module.__dict__
        self._merges = plain and many_rows
        self._fuses = plain and module.bias is None and has_fused_kernel(module.weight)
        self.followers: list[CpuLinear] = []
        self.ready: tuple[Rows, Tensor, Tensor] | None = None

    @property
    def weight(self) -> Weight:
        weight: Tensor = self._module.weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self._module.bias  # type: ignore[assignment]
        return bias

    def __call__(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active(rows)
        if active and (merged := self._slots_to_merge(rows)):
            return self._merged_product(x, rows, merged)
        if self._fuses and 0 < x.numel() <= FUSED_TOKENS * self.in_features and _is_fusable(x):
            return self._fused_product(x, rows)
        y = self._forward(x, *args, **kwargs)
        if active:
            if x.is_contiguous() and y.is_contiguous():
                delta_linear(y, x, rows, self, exact=self._kernels.exact)
            else:
                flat = y.reshape(-1, self.out_features)
                self.add(flat, x.reshape(-1, self.in_features), rows)
                y = flat.view(y.shape)
        return y

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        delta_linear(y, x, rows, self, exact=self._kernels.exact)

    def _fused_product(self, x: Tensor, rows: Rows) -> Tensor:
        """The base's product with the deltas added; with it, those of the modules that last took the same input."""

        def multiply(linears: list[CpuLinear]) -> list[Tensor]:
            return fused_linear(x, [linear._fused_site(x, rows) for linear in linears])

        return self._kernels.shared_input.product(self, x, rows, multiply)

    def _fused_site(self, x: Tensor, rows: Rows) -> tuple[Weight, DeltaTable, Rows | None]:
        """This module as `fused_linear` takes it."""
        fits = x.numel() == len(rows) * self.in_features
        return self.weight, self, rows if fits and self.active(rows) else None

    def _slots_to_merge(self, rows: Rows) -> list[int]:
        """The slots with so many tokens that base and delta are merged for them."""
        if not self._merges or rows.most_tokens < MERGE_TOKENS or not can_merge(self.weight):
            return []
        return [slot for slot, own in rows.tokens.items() if len(own) >= MERGE_TOKENS and slot in self._matrices]

    def _merged_product(self, x: Tensor, rows: Rows, slots: list[int]) -> Tensor:
        """All tokens: those of `slots` by one merged product each, the others by the base and their deltas."""
        flat = x.reshape(-1, self.in_features)
        if rows.only_slot is not None:
            y = merged_linear(flat, self.weight, self._matrices[rows.only_slot], self.bias)
        else:
            y = flat.new_empty(len(flat), self.out_features)
            for slot in slots:
                index = rows.groups[slot]
                y[index] = merged_linear(flat[index], self.weight, self._matrices[slot], self.bias)
            index, others = rows.without(slots)
            if len(others):
                y[index] = self._alone(flat[index], others)
        return y.view(*x.shape[:-1], self.out_features)

    def _alone(self, x: Tensor, rows: Rows) -> Tensor:
        """The product of some tokens of a step, which no other module takes."""
        y = self._forward(x)
        delta_linear(y, x, rows, self)
        return y


class PackedLinear(CpuLinear):
    """A linear module whose weight the base keeps packed, with the deltas of it."""

    def __init__(self, kernels: CpuKernels, module: nn.Module, packed: DeltaSite, *, many_rows: bool) -> None:
        super().__init__(
            kernels, module, self._product, packed.out_features, packed.in_features, many_rows=many_rows, packed=packed
        )
        self._merges = many_rows and not kernels.exact

    @property
    def weight(self) -> Weight:
        assert self.base is not None
        return self.base

    @property
    def bias(self) -> Tensor | None:
        return getattr(self._module, "bias", None)

    def __call__(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        x = x.contiguous()
        if self._kernels.exact or x.numel() >= MERGE_TOKENS * self.in_features:
            return super().__call__(x, rows)
        y = self._fused_product(x, rows)
        return y if self.bias is None else y.add_(self.bias)

    def _alone(self, x: Tensor, rows: Rows) -> Tensor:
        if len(x) >= MERGE_TOKENS:
            return super()._alone(x, rows)
        y = fused_linear(x, [self._fused_site(x, rows)])[0]
        return y if self.bias is None else y.add_(self.bias)

    def _product(self, x: Tensor) -> Tensor:
        """The base's own output for many tokens, or in exact arithmetic."""
        flat = x.reshape(-1, self.in_features)
        if self._kernels.exact:
            y = flat.new_zeros(len(flat), self.out_features)
            assert self.base is not None
            exact_product(y, flat, range(len(flat)), self.base, self)
            y = y if self.bias is None else y.add_(self.bias)
        else:
            y = merged_linear(flat, self.weight, None, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class CpuEmbedding(DeltaTable):
    """The deltas of an embedding table, and its own rows where it is packed."""

    def add(self, y: Tensor, ids: Tensor, rows: Rows) -> None:
        delta_embedding(y, ids, rows, self)

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        assert self.base is not None
        y = torch.zeros(len(ids), self.in_features, dtype=dtype)
        self.base.delta_embedding(y, range(len(ids)), ids.tolist(), 1.0)
        return y


def _is_fusable(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.is_contiguous()
