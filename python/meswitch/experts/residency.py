"""Which experts are resident: the native residency decides and loads, the layers hold what it gives."""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch import _native
from meswitch.errors import BudgetError
from meswitch.experts.catalogue import Expert
from meswitch.layers.install import ExpertLayers

_log = logging.getLogger(__name__)

READ_BYTES_PER_SECOND = 1e9
"""How quickly a delta is assumed to be read before any was."""


@dataclass
class Installation:
    """An expert that is being put into the layers: what is left of it, and leases of its room and its tensors."""

    expert: Expert
    slot: int
    leases: tuple[Any, ...]
    steps: Iterator[None]

    def advance(self, deadline: float) -> bool:
        """Puts more into the layers until the deadline; whether all of it is there. Raises `FormatError` for tensors
        that do not fit each other."""
        return all(time.monotonic() < deadline for _ in self.steps)


class Residency:
    """The resident experts of one engine, over the native half.

    An expert is *resident* for requests once it has a slot: its tensors are in memory and in the layers. `enter`,
    `leave`, `want`, `prefetch`, `set_budget` and what reads may be called from any thread. `update`, `pin` and `unpin`
    belong to the engine's thread, which alone changes the layers.

    `notify` is called on another thread when there is something for `update`.
    """

    budget_name = "host_budget"
    """What bounds the experts in the layers."""

    def __init__(
        self, layers: ExpertLayers, budget: int | None, notify: Callable[[], object], *, policy: str = "lru"
    ) -> None:
        self._layers: ExpertLayers | None = layers
        self._native = _native.Residency(budget, policy, notify)
        self._experts: dict[int, Expert] = {}
        self._free: list[int] = []  # a heap of the slots below `_slots` that nobody has
        self._slots = 0
        self._installing: deque[Installation] = deque()
        self._last_counters: dict[str, int | None] | None = None
        self._read_bytes, self._read_seconds = 1.0, 1 / READ_BYTES_PER_SECOND

    @property
    def layers(self) -> ExpertLayers:
        assert self._layers is not None, "closed"
        return self._layers

    # from any thread

    def enter(self, expert: Expert) -> None:
        """Makes an opened expert known. Raises `BudgetError` where it is larger than the budget."""
        with named_budget(expert, self.budget_name, self._native):
            expert.unit = self._native.add(expert.name, expert.delta.native)
        self._experts[expert.unit] = expert

    def leave(self, expert: Expert) -> None:
        """Forgets an expert that nobody uses any more; `update` takes it out of the layers."""
        if expert.unit is not None:
            self._native.retire(expert.unit)
            if expert.slot is None:
                self._experts.pop(expert.unit, None)

    def ask(self, expert: Expert) -> bool:
        """Counts a request for an expert, and says whether it is in memory."""
        resident = self._native.ask(self._unit(expert))
        expert.counts.hits += resident
        expert.counts.misses += not resident
        return resident

    def want(self, expert: Expert, rank: int | None) -> None:
        """Says that requests wait for an expert; the one with the least rank gets room first."""
        if expert.unit is not None:
            self._native.want(expert.unit, rank)

    def prefetch(self, expert: Expert) -> None:
        """Loads an expert where there is room for it."""
        self._native.prefetch(self._unit(expert))

    def keep(self, expert: Expert) -> None:
        """Never lets an expert leave once it is in memory, and loads it where there is room."""
        expert.pinned = True
        expert.kept = expert.kept or self._native.pin(self._unit(expert))
        if expert.kept is None:
            self.prefetch(expert)  # `update` keeps it

    def let_go(self, expert: Expert) -> None:
        """Ends what `keep` began."""
        kept, expert.kept, expert.pinned = expert.kept, None, False
        if kept is not None:
            kept.release()

    def has_room(self, expert: Expert) -> bool:
        """Whether an expert is in memory, or its load has room and will end."""
        return self._native.place(self._unit(expert)) in ("loading", "host")

    def set_budget(self, budget: int | None) -> None:
        """Changes the budget: idle experts leave now, those in use when their requests end."""
        self._native.set_budget(budget)

    def start_trace(self, path: Path) -> None:
        """Writes residency events to a file from now on. Raises `OSError` where there can be none."""
        self._native.start_trace(path)

    def seconds_to_load(self, expert: Expert) -> float:
        """How long a load of an expert takes, by what the loads until now took."""
        return expert.nbytes * self._read_seconds / self._read_bytes

    def where(self, expert: Expert) -> str:
        """In which memory an expert is: "disk" or "host"."""
        return "disk" if expert.slot is None else "host"

    @property
    def budget(self) -> int | None:
        """That of `budget_name`."""
        return self._native.counters()["budget"]

    def counters(self) -> dict[str, int | None]:
        """Counts since the start, and bytes; those of the end once it is closed."""
        if self._last_counters is None:
            with suppress(ValueError):  # it is closed at this moment, on the engine's thread
                return self._native.counters()
        assert self._last_counters is not None, "kept before it was closed"
        return self._last_counters

    def device_counters(self) -> dict[str, int | None] | None:
        """The same of a device's memory; `None` where nothing bounds it."""
        return None

    # on the engine's thread

    @property
    def is_installing(self) -> bool:
        """Whether `update` has more to put into the layers."""
        return bool(self._installing)

    def update(self, seconds: float = math.inf) -> tuple[list[Expert], list[tuple[Expert, Exception]]]:
        """Puts what was loaded into the layers, and takes out what was evicted.

        Returns the experts that have come or gone, and those that could not be loaded, each with why. An expert of
        thousands of sites takes a second: after `seconds` the rest is left for the next call.
        """
        if (error := self._native.take_trace_error()) is not None:
            _log.warning("the trace of the residency has ended: %s", error)
        changed: list[Expert] = []
        failed: list[tuple[Expert, Exception]] = []
        self._take_events(changed, failed)
        deadline = time.monotonic() + seconds
        while self._installing:
            installation = self._installing[0]
            try:
                if not installation.advance(deadline):
                    break
                changed += self._finish(installation)
            except Exception as error:  # tensors that do not fit each other, each of which is what was written
                failed.append((installation.expert, error))
                self._cancel(installation)
            self._installing.popleft()
        return changed, failed

    def _take_events(self, changed: list[Expert], failed: list[tuple[Expert, Exception]]) -> None:
        for event, unit, taken, error in self._native.take_events():
            expert = self._experts.get(unit)
            if expert is None:
                continue
            if event == "failed":
                assert error is not None
                failed.append((expert, error))
            elif event == "evicted":
                expert.counts.evictions += 1
                self._uninstall(expert)
                changed.append(expert)
            else:
                try:
                    self._arrive(expert, taken)
                except Exception as error:  # it was closed at this moment
                    failed.append((expert, error))

    def _arrive(self, expert: Expert, seconds: float) -> None:
        """An expert has been loaded."""
        self._count_load(expert, seconds)
        self._begin(expert)

    def pin(self, expert: Expert) -> bool:
        """Keeps an expert resident until `unpin`; false where it is not, or not any more."""
        lease = None if expert.slot is None else self._native.pin(self._unit(expert))
        if lease is not None:
            expert.leases.append(lease)
        return lease is not None

    def unpin(self, expert: Expert) -> None:
        """Ends what one `pin` began."""
        expert.leases.pop().release()

    def close(self) -> None:
        """Stops loads, and lets go of the model."""
        while self._installing:
            self._cancel(self._installing.popleft())
        for expert in list(self._experts.values()):
            while expert.leases:
                self.unpin(expert)
            self._uninstall(expert)
        self._last_counters = self._native.counters()
        self._native.close()
        self._experts.clear()
        self._layers = None

    def _begin(self, expert: Expert) -> None:
        """Begins to put an expert's tensors into the lowest free slot, so that tables by slot stay short; nothing where
        it has left again."""
        leases = self._hold(expert)
        if not leases:
            return
        try:
            tensors = leases[-1].tensors()
            assert tensors is not None
            sites, names = expert.delta.iterate(tensors), expert.delta.native.names()
        except BaseException:
            _release(leases)
            raise
        slot = heapq.heappop(self._free) if self._free else self._slots
        self._slots = max(self._slots, slot + 1)
        steps = self.layers.installing(slot, sites, names, tied=expert.tied)
        self._installing.append(Installation(expert, slot, leases, steps))

    def _hold(self, expert: Expert) -> tuple[Any, ...]:
        """Leases of an expert's room in the layers and of its tensors, which may be one; none where it has left."""
        lease = self._native.pin(self._unit(expert))
        return () if lease is None else (lease,)

    def _finish(self, done: Installation) -> list[Expert]:
        """Gives the expert its slot, unless nobody wants it any more."""
        expert = done.expert
        if expert.delta is None:
            self._cancel(done)
            return []
        expert.slot = done.slot
        room, *others = done.leases
        if expert.pinned:
            expert.kept = room
        else:
            others.append(room)
        _release(others)
        return [expert]

    def _cancel(self, installation: Installation) -> None:
        """Takes what was put into the layers out again."""
        heapq.heappush(self._free, installation.slot)
        self.layers.remove(installation.slot)
        _release(installation.leases)

    def _uninstall(self, expert: Expert) -> None:
        """Takes an expert out of the layers, which held the last of its tensors."""
        if expert.slot is not None:
            slot, expert.slot = expert.slot, None
            heapq.heappush(self._free, slot)
            self.layers.remove(slot)
        if expert.delta is None and expert.unit is not None:
            self._experts.pop(expert.unit, None)

    def _count_load(self, expert: Expert, seconds: float) -> None:
        self._read_bytes += expert.nbytes
        self._read_seconds += seconds
        expert.counts.loads += 1
        expert.counts.load_seconds.append(seconds)

    def _unit(self, expert: Expert) -> int:
        assert expert.unit is not None, "entered"
        return expert.unit


def _release(leases: Iterable[Any]) -> None:
    for lease in leases:
        lease.release()


@contextmanager
def named_budget(expert: Expert, name: str, native: _native.Residency) -> Iterator[None]:
    """A `BudgetError` inside says which expert is larger than which budget."""
    try:
        yield
    except BudgetError as error:
        budget = native.counters()["budget"]
        raise BudgetError(
            f"expert {expert.name!r} needs {expert.nbytes} bytes, {name} is {budget} bytes",
            hint=f"raise {name}, or compress with fewer bits",
        ) from error
