"""The continuous-batching scheduler that knows experts, the sampler that knows requests, and the KV cache's
size.

transformers packs the tokens of all requests of a step into one row. `ExpertScheduler` remembers the step it
chose, so the slot of every packed token and of every kept logits row is known before the forward pass, and it
keeps the prefix cache apart by expert. `RequestSampler` gives each logits row its own request's processors
and random generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

NAME = "meswitch"
BASE = -1  # the slot of a request that the base answers


@dataclass
class Seat:
    """Where a request sits: the slot of its expert, and the salt that keeps its prefixes apart from
    others'."""

    slot: int = BASE
    salt: int = 0


class ExpertScheduler(FIFOScheduler):  # type: ignore[misc,unused-ignore]
    """First in, first out over all experts; see the module's docstring."""

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int) -> None:
        self.seats: dict[str, Seat] = {}
        self.step: list[FutureRequestState] = []
        self._stand_ins: dict[tuple[int, int], int] = {}
        super().__init__(cache, safety_margin, max_requests_per_batch)
        self._salt_prefixes(cache)

    def _salt_prefixes(self, cache: Any) -> None:
        """Block hashes chain from a prompt's first token, so another id in its place starts another chain."""
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda request_id, ids: search(request_id, self._salted(request_id, ids))
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._salted_marks(allocator.mark_complete_blocks)

    def _salted_marks(self, mark: Callable[[str, list[int], int], None]) -> Callable[[str, list[int], int], None]:
        return lambda request_id, ids, count: mark(request_id, self._salted(request_id, ids), count)

    def _salted(self, request_id: str, ids: list[int]) -> list[int]:
        salt = self.seats[request_id].salt
        if not salt or not ids:
            return ids
        stand_in = self._stand_ins.setdefault((salt, ids[0]), -1 - len(self._stand_ins))
        return [stand_in, *ids[1:]]

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        batch = super().schedule_batch(token_budget, cache_budget)
        self.step = batch[0] or []
        return batch

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        if cancelled:  # as when a request finishes: its blocks are free again
            self.block_new_requests = False
        return cancelled

    def token_slots(self) -> list[int]:
        """The slot of every packed token of the step, in order."""
        slots: list[int] = []
        for entry in self.step:
            slots += [self.seats[entry.state.request_id].slot] * entry.query_length
        return slots

    def kept_slots(self) -> list[int]:
        """The slot of every row that reaches lm_head: one a request, those with a new token first."""
        slots = [self.seats[entry.state.request_id].slot for entry in self.step if entry.has_new_token]
        return slots + [BASE] * (len(self.step) - len(slots))


SCHEDULER_MAPPING[NAME] = ExpertScheduler
