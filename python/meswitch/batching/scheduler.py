"""Which request runs in a step, and the expert of every token and of every row of logits.

transformers packs the tokens of all requests of a step into one row. `ExpertScheduler` remembers the step it chose, so
the slot of every packed token and of every kept row of logits is known before the forward pass, and it keeps the prefix
cache apart by expert.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from meswitch.batching.bridge import Scheduler
from meswitch.kernels.rows import BASE_SLOT


@dataclass
class RequestSlot:
    """The slot of a request's expert, and the salt that keeps the expert's prefixes apart from others'."""

    slot: int = BASE_SLOT
    salt: int = 0


class ExpertScheduler(Scheduler):
    """First in, first out over all experts. `slots`: by request id, from before a request is added until it is gone.
    `max_requests`: the most requests of a step."""

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int) -> None:
        self.max_requests = max_requests_per_batch
        self.slots: dict[str, RequestSlot] = {}
        self._first_ids: dict[int, dict[int, int]] = {}  # by salt
        self._numbers = itertools.count(-2, -1)  # never one twice: pages outlive the expert whose number they have
        super().__init__(cache, safety_margin, max_requests_per_batch)

    def prefix_ids(self, request_id: str, ids: list[int]) -> list[int]:
        """Pages are found by hashes that chain from a prompt's first id: another id in its place, one for each salt,
        starts another chain."""
        salt = self.slots[request_id].salt
        if not salt or not ids:
            return ids
        own = self._first_ids.setdefault(salt, {})
        if ids[0] not in own:
            own[ids[0]] = next(self._numbers)
        return [own[ids[0]], *ids[1:]]

    def forget(self, salt: int) -> None:
        """Drops what is kept for a salt that no later request has."""
        self._first_ids.pop(salt, None)

    def token_slots(self) -> list[int]:
        """The slot of every packed token of the step, in order."""
        slots: list[int] = []
        for entry in self.step:
            slots += [self.slots[entry.state.request_id].slot] * entry.query_length
        return slots

    def count_tokens(self) -> tuple[int, int]:
        """How many requests of the step decode, a token each, and how many tokens are of prompts."""
        decoding = sum(entry.query_length == 1 and entry.has_new_token for entry in self.step)
        return decoding, sum(entry.query_length for entry in self.step) - decoding

    def kept_slots(self) -> list[int]:
        """The slot of every row that reaches lm_head: one a request, those with a new token first."""
        slots = [self.slots[entry.state.request_id].slot for entry in self.step if entry.has_new_token]
        return slots + [BASE_SLOT] * (len(self.step) - len(slots))
