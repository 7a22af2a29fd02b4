"""The options of a distillation: one object for the library, the command line and the journal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

METHODS = ("auto", "whole", "blocks")
Method: TypeAlias = Literal["auto", "whole", "blocks"]


@dataclass(frozen=True)
class DistillOptions:
    """How the scales of a delta are trained.

    `method`: `whole` trains all sites at once and holds both models in float32 (about 13 bytes a weight); `blocks`
    trains one block after the other and holds one block of each; `auto` is `whole` if that fits in half of the free
    memory. `steps`: optimizer steps, of `blocks` in every block. `batch`: windows a step. `window`: tokens of a window,
    the first eighth of which is context only. `rate`: the learning rate, on the logarithm of each scale; `None` derives
    it from the delta and the first gradients (see `optimizer.optimize`). `seed` draws and orders the windows.
    `heldout_share`: windows that only measure, as a share of all, at most about 2,048 tokens.

    Raises `ValueError` for an unknown method or a number out of range.

    >>> DistillOptions(method="blocks", steps=40).batch
    8
    """

    method: Method = "auto"
    steps: int = 120
    window: int = 128
    batch: int = 8
    rate: float | None = None
    seed: int = 0
    heldout_share: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"expected a method of {', '.join(METHODS)}, found {self.method!r}")
        counts_in_range = self.steps >= 1 and self.window >= 2 and self.batch >= 1
        rate_in_range = self.rate is None or self.rate > 0
        if not counts_in_range or not rate_in_range or not 0 < self.heldout_share < 1:
            raise ValueError(
                "expected at least 1 step, a window of 2, a batch of 1, a rate above 0 and a held-out share between 0 "
                f"and 1, found {self.steps}, {self.window}, {self.batch}, {self.rate}, {self.heldout_share}"
            )
