"""Tokens by slot, as kernels on a GPU take them: at most four tokens of one slot are a group.

slots of tokens   2 -1  0  2  2  2  2      groups (slot, first, count)   (0, 0, 1) (2, 1, 4) (2, 5, 1)
                                           order                         2 | 0 3 4 5 | 6
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_TOKENS = 4
"""Tokens of a group."""


@dataclass(frozen=True)
class Groups:
    """Tensors on the device: `groups int32 [most, 3]`, the number of them `count int32 [1]`, and `order int32 [T]`."""

    groups: Tensor
    count: Tensor
    order: Tensor

    @classmethod
    def of_tokens(cls, tokens: Mapping[int, Sequence[int]], device: torch.device | str = "cpu") -> Groups:
        """Groups of the tokens of each slot, known to the host: one copy to the device.

        >>> Groups.of_tokens({2: [0, 3, 4, 5, 6], 0: [2]}).groups.tolist()
        [[0, 0, 1], [2, 1, 4], [2, 5, 1]]
        """
        groups: list[int] = []
        order: list[int] = []
        for slot, own in sorted(tokens.items()):
            for start in range(0, len(own), MOST_TOKENS):
                some = own[start : start + MOST_TOKENS]
                groups += slot, len(order), len(some)
                order += some
        numbers = torch.tensor([len(groups) // 3, *groups, *order], dtype=torch.int32, device=device)
        return cls(numbers[1 : 1 + len(groups)].view(-1, 3), numbers[:1], numbers[1 + len(groups) :])

    @classmethod
    def of_tensor(cls, slots: Tensor) -> Groups:
        """Groups of slots `int64 [T]` that were computed on the device, without waiting for it.

        >>> found = Groups.of_tensor(torch.tensor([2, -1, 0, 2, 2, 2, 2]))
        >>> found.groups[: int(found.count)].tolist()
        [[0, 1, 1], [2, 2, 4], [2, 6, 1]]
        """
        total = len(slots)
        chosen, order = slots.sort(stable=True)
        place = torch.arange(total, device=slots.device)
        begins = chosen != chosen.roll(1)
        begins[:1] = True
        within = place - torch.where(begins, place, 0).cummax(0).values
        own = chosen >= 0
        first = own & (within % MOST_TOKENS == 0)
        number = first.cumsum(0) - 1
        groups = torch.zeros(total + 1, 3, dtype=torch.int64, device=slots.device)  # the last takes what is in none
        groups.index_copy_(0, number.where(first, total), torch.stack([chosen, place, torch.zeros_like(place)], 1))
        groups[:, 2].index_add_(0, number.where(own, total), torch.ones_like(place))
        return cls(groups[:total].int(), first.sum(0, keepdim=True).int(), order.int())

    @classmethod
    def of_one_slot(cls, tokens: int, device: torch.device | str) -> Groups:
        """All tokens are slot 0's."""
        return cls.of_tokens({0: range(tokens)}, device)

    def launches(self, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Groups and their number, at most `most` at a time."""
        total = len(self.groups)
        if total <= most:
            yield self.groups, self.count
            return
        starts = torch.arange(0, total, most, device=self.count.device)
        counts = (self.count - starts).clamp(0, most).int()
        for at, start in enumerate(range(0, total, most)):
            yield self.groups[start : start + most], counts[at : at + 1]
