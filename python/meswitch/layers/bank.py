"""One vector parameter of the base and of every expert, to be gathered by token."""

from __future__ import annotations

import torch
from torch import Tensor

from meswitch.kernels.rows import Rows


class Bank:
    """The values that experts give one vector parameter: row 0 is the base's, row slot + 1 that slot's."""

    def __init__(self, base: Tensor) -> None:
        self._base = base.detach()
        self._values = self._base.unsqueeze(0).clone()

    @property
    def dim(self) -> int:
        """Axes of one value."""
        return self._base.dim()

    def set(self, slot: int, value: Tensor) -> None:
        count = self._values.shape[0]
        if slot + 2 > count:  # at least doubled, so that many experts are not copied for each one more
            missing = max(slot + 2 - count, count)
            self._values = torch.cat([self._values, self._base.expand(missing, *self._base.shape)])
        self._values[slot + 1] = value.to(self._values)

    def clear(self, slot: int) -> None:
        if slot + 1 < self._values.shape[0]:
            self._values[slot + 1] = self._base

    def value(self, slot: int) -> Tensor:
        """The vector of one slot; the base's for a slot without."""
        return self._values[slot + 1] if slot + 1 < self._values.shape[0] else self._base

    def gather(self, rows: Rows, last_slot: int) -> Tensor:
        """The vector of every row, `[T, ...]`; the base's for a slot without. No slot is above `last_slot`."""
        index = rows.bank_index
        if last_slot + 1 >= self._values.shape[0]:
            index = index.where(index < self._values.shape[0], torch.zeros((), dtype=index.dtype, device=index.device))
        return self._values.index_select(0, index)
