"""Which slot each token of a packed step belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from meswitch import _native
from meswitch.kernels.groups import Groups

BASE_SLOT = -1
"""The slot of tokens that the base answers."""


class Rows:
    """The slot of every token of a step, or of every row that reaches lm_head; −1 is the base.

    Made once a step from numbers on the host, or of a tensor of computed ones (`of_tensor`), for which the host waits
    only when it is asked. Its tensors live on `device`, where the model is, and are made when first asked for.

    >>> Rows([0, -1, 0, 2]).tokens
    {0: [0, 2], 2: [3]}
    """

    def __init__(self, slots: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.slots, self.device = list(slots), device
        self._without: dict[frozenset[int], tuple[Tensor, Rows]] = {}
        self._computed: Tensor | None = None

    @classmethod
    def of_tensor(cls, slots: Tensor) -> Rows:
        """Rows of slots that were computed, `int64 [T]`.

        >>> Rows.of_tensor(torch.tensor([1, -1])).tokens
        {1: [0]}
        """
        rows = cls.__new__(cls)
        rows.device, rows._without, rows._computed = slots.device, {}, slots
        return rows

    def __len__(self) -> int:
        return len(self.slots) if self._computed is None else len(self._computed)

    @cached_property
    def slots(self) -> list[int]:
        """One a token."""
        assert self._computed is not None, "given"
        slots: list[int] = self._computed.tolist()
        return slots

    @cached_property
    def tokens(self) -> dict[int, list[int]]:
        """The tokens of each slot; the base's are not among them."""
        tokens: dict[int, list[int]] = {}
        for token, slot in enumerate(self.slots):
            if slot != BASE_SLOT:
                tokens.setdefault(slot, []).append(token)
        return tokens

    @property
    def is_on_host(self) -> bool:
        """Whether the host knows the slots without waiting for the device."""
        return self._computed is None or "slots" in self.__dict__

    @cached_property
    def native(self) -> _native.Rows:
        """The same for the native kernels."""
        return _native.Rows(self.slots)

    @cached_property
    def launch_groups(self) -> Groups:
        """The same for kernels on a GPU."""
        if self.is_on_host:
            return Groups.of_tokens(self.tokens, self.device)
        assert self._computed is not None
        return Groups.of_tensor(self._computed)

    @cached_property
    def slot_index(self) -> Tensor:
        """The slot of every token, `int32 [tokens]`."""
        return (self._tensor(self.slots) if self._computed is None else self._computed).int()

    @cached_property
    def only_slot(self) -> int | None:
        """The one expert's slot that every token belongs to, if there is one."""
        first = next(iter(self.tokens), None)
        return first if first is not None and len(self.tokens[first]) == len(self.slots) else None

    @cached_property
    def most_tokens(self) -> int:
        """The number of tokens of the slot that has most of them."""
        return max(map(len, self.tokens.values()), default=0)

    @cached_property
    def groups(self) -> dict[int, Tensor]:
        """The tokens of each slot, `int64`; the base's are not among them."""
        return {slot: self._tensor(tokens) for slot, tokens in self.tokens.items()}

    @cached_property
    def distinct(self) -> dict[int, Tensor]:
        """`groups`, and the tokens of the base."""
        base = [token for token, slot in enumerate(self.slots) if slot == BASE_SLOT]
        return {**({BASE_SLOT: self._tensor(base)} if base else {}), **self.groups}

    @cached_property
    def bank_index(self) -> Tensor:
        """Slot + 1 of every token, `int64 [tokens]`: its row in a table whose first row is the base's."""
        return self._tensor([slot + 1 for slot in self.slots])

    def without(self, slots: Iterable[int]) -> tuple[Tensor, Rows]:
        """The tokens that belong to none of `slots`, `int64`, and their own `Rows`.

        >>> Rows([0, -1, 0, 2]).without([0])[0]
        tensor([1, 3])
        """
        left_out = frozenset(slots)
        if left_out not in self._without:
            left = [token for token, slot in enumerate(self.slots) if slot not in left_out]
            rest = Rows([self.slots[token] for token in left], self.device)
            self._without[left_out] = self._tensor(left), rest
        return self._without[left_out]

    def _tensor(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)
