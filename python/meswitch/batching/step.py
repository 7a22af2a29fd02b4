"""One step of a batch: what an attention function is told of it, and the tokens that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STEP = "paged_step"  # the keyword under which an attention function gets the `PagedStep`


@dataclass(frozen=True)
class NewToken:
    """A token that a step made; `finished` where it is the request's last."""

    request_id: str
    token: int
    finished: bool


@dataclass(frozen=True)
class CacheAccess:
    """What the layers of one kind of attention read and write in a step.

    `queries` and `keys`: how many each request of the step has, in order; `firsts`: the position of its first query in
    its own sequence; `key_counts int32 [requests]`: `keys` on the
    model's device. `read int64 [sum(keys)]`: where the keys lie in the cache, empty where nothing was cached before;
    `write int64 [sum(queries)]`. `padding`: a place that may be read for a key that is masked. `window`: how many keys
    a token sees at most, its own included; `None` for all. `dtype`: of the cache.
    """

    queries: list[int]
    keys: list[int]
    firsts: list[int]
    key_counts: Tensor
    read: Tensor
    write: Tensor
    padding: int
    window: int | None
    dtype: torch.dtype


class PagedStep:
    """One step's plan of attention for each layer, and the cache to carry it out on.

    It is also what the model gets as its `cache`: from transformers 5.24 on, attention modules pass new keys and values
    through `cache.update` before they call the attention function. Here that leaves them as they are, since the
    function itself writes and reads, so that one function serves older and newer modules.
    """

    def __init__(self, allocators: Mapping[int, Any], plans: Mapping[int, Any]) -> None:
        """`allocators`: transformers' part of the cache by layer; `plans`: by `index` of an allocator."""
        self._allocators, self._plans = allocators, plans
        self._entered: set[int] = set()

    def plan(self, layer: int) -> Any:
        """What `plan_attention` made of the `CacheAccess` of the layer's kind."""
        return self._plans[self._allocators[layer].index]

    def enter(self, layer: int) -> bool:
        """Notes that a layer attends; false where it has already done so in this step, and its keys would be lost."""
        first = layer not in self._entered
        self._entered.add(layer)
        return first

    @property
    def complete(self) -> bool:
        """Whether every layer has attended."""
        return self._entered == self._allocators.keys()

    def write_and_read(
        self, layer: int, keys: Tensor, values: Tensor, read: Tensor, write: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes the new tokens' `keys` and `values [tokens, key heads, width]` to `write`, and gives those at `read`
        (the new ones themselves where `read` is empty)."""
        updated: tuple[Tensor, Tensor] = self._allocators[layer].update(keys, values, layer, read, write)
        return updated

    def update(self, keys: Tensor, values: Tensor, layer: int, kwargs: Any = None) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens before the step, for models that number positions themselves; here every token has its own number."""
        return 0
