"""Which experts are resident, under a byte budget, and the slot of each."""

from __future__ import annotations

import heapq
from collections import OrderedDict

from meswitch.experts.catalogue import Expert
from meswitch.layers.install import ExpertLayers


class Residency:
    """The resident experts of one engine. An expert with pins is never evicted; of those without, the one whose last
    request ended first goes first.

    Everything runs on the engine's thread; `budget`, `bytes` and the counters may be read from any. Admitting and
    evicting cost the same however many experts there are.
    """

    def __init__(self, layers: ExpertLayers, budget: int | None) -> None:
        self._layers: ExpertLayers | None = layers
        self.budget = budget
        self.bytes = self._pinned_bytes = 0
        self.hits = self.misses = self.evictions = 0
        self._idle: OrderedDict[int, Expert] = OrderedDict()  # by slot, without pins, least recently used first
        self._free: list[int] = []  # a heap of the slots below `_slots` that nobody has
        self._slots = 0

    @property
    def layers(self) -> ExpertLayers:
        assert self._layers is not None, "closed"
        return self._layers

    def close(self) -> None:
        """Lets go of the model."""
        self._layers = None

    def admit(self, expert: Expert) -> bool:
        """Pins `expert` and makes it resident, evicting unpinned ones first. False if pinned ones fill the budget."""
        if expert.slot is None:
            if not self._make_room(expert.nbytes):
                return False
            self.misses += 1
            self._install(expert)
        else:
            self.hits += 1
        if not expert.pins:
            self._pinned_bytes += expert.nbytes
            self._idle.pop(self._slot(expert), None)
        expert.pins += 1
        expert.served += 1
        return True

    def unpin(self, expert: Expert) -> None:
        """Ends what one `admit` began."""
        expert.pins -= 1
        if not expert.pins:
            self._pinned_bytes -= expert.nbytes
            self._idle[self._slot(expert)] = expert

    def evict(self, expert: Expert) -> None:
        """Takes an expert without pins out of the layers; one that is not resident stays so."""
        if expert.slot is None:
            return
        slot, expert.slot = expert.slot, None
        self.bytes -= expert.nbytes
        self._idle.pop(slot, None)
        heapq.heappush(self._free, slot)
        self.layers.remove(slot)

    def _make_room(self, nbytes: int) -> bool:
        if self.budget is None:
            return True
        if self._pinned_bytes + nbytes > self.budget:
            return False
        while self.bytes + nbytes > self.budget:
            self.evict(next(iter(self._idle.values())))
            self.evictions += 1
        return True

    def _install(self, expert: Expert) -> None:
        """Reads an expert's tensors, and puts them into the lowest free slot, so that tables by slot stay short.

        Raises `ChecksumError` or `OSError` where its file has changed.
        """
        sites = expert.delta.load()
        slot = self._free[0] if self._free else self._slots
        try:
            self.layers.install(slot, sites.values(), tied=expert.tied)
        except BaseException:
            self.layers.remove(slot)
            raise
        if self._free:
            heapq.heappop(self._free)
        else:
            self._slots += 1
        expert.slot = slot
        self.bytes += expert.nbytes

    def _slot(self, expert: Expert) -> int:
        assert expert.slot is not None
        return expert.slot

    def counters(self) -> dict[str, int | None]:
        return {
            "budget": self.budget,
            "bytes": self.bytes,
            "hits": self.hits,
            "misses": self.misses,
            "evictions": self.evictions,
        }
