"""The rows of the running forward pass."""

from __future__ import annotations

import torch

from meswitch.kernels.rows import BASE_SLOT, Rows


class Step:
    """Which slot each row of the running forward pass belongs to; one object shared by every wrapper.

    `tokens` are the packed tokens, `kept` the rows that reach lm_head. Between `begin` and `end` experts are active; a
    forward pass outside of that is the base's.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.end()

    def begin(self, tokens: list[int], kept: list[int]) -> None:
        """`tokens`: the slot of every packed token; `kept`: of every row that reaches lm_head. −1 is the base."""
        self.tokens = Rows(tokens, self.device)
        self.kept = Rows(kept, self.device)
        self.last_slot = max(tokens, default=BASE_SLOT)

    def end(self) -> None:
        """No expert is active any more."""
        self.tokens = self.kept = Rows([], self.device)
        self.last_slot = BASE_SLOT
