"""In which order requests enter the batch.

Requests wait in groups, one for each expert, in order of arrival within it. A group can be taken from while its expert
is in memory. Among such groups, the request that came first goes first, and so it also passes earlier ones whose
expert is still to be loaded: that saves loads, since an expert serves all who wait for it before it leaves.

So that nobody starves:

* An expert gets room in the order of the first request of each group, which the residency is told as its *rank*.
* A request whose expert has no room is passed by later ones of other experts for a while only: the time of two loads
  of its expert, `PATIENCE_SECONDS` at least. After that they wait until it has room, so the experts that fill the
  budget become free as soon as their running requests end. Requests for the base go on.
* Requests of the class `batch` wait for all of the class `interactive`, but after `BATCH_SECONDS` they count as those.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from meswitch.engine.request import Request
from meswitch.experts.catalogue import Expert
from meswitch.experts.residency import Residency

PATIENCE_SECONDS = 0.25
"""A request without room is passed by later ones for so long, or for two loads of its expert if these take longer."""

BATCH_SECONDS = 30.0
"""After so long a request of the class `batch` is as urgent as others."""

_LATER = 1 << 48  # added to the rank of what is not urgent


class _Group:
    """The requests that wait for one expert (`None`: the base), the first one first."""

    def __init__(self, expert: Expert | None) -> None:
        self.expert = expert
        self.urgent: OrderedDict[str, Request] = OrderedDict()
        self.later: OrderedDict[str, Request] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self.urgent or self.later)

    @property
    def first(self) -> Request:
        return next(iter((self.urgent or self.later).values()))

    @property
    def rank(self) -> int:
        return self.first.rank

    @property
    def ready(self) -> bool:
        return self.expert is None or self.expert.slot is not None

    def queue_of(self, request: Request) -> OrderedDict[str, Request]:
        return self.later if request.rank >= _LATER else self.urgent


class AdmissionQueue:
    """Accepted requests that are not in the batch yet. Belongs to the engine's thread.

    `max_experts`: the most experts whose requests run at a time. `clock`: seconds. Finding the next request costs the
    logarithm of the number of experts that are waited for, however many requests wait.
    """

    def __init__(
        self,
        residency: Residency,
        max_experts: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residency, self._max_experts, self._clock = residency, max_experts, clock
        self._groups: dict[Expert | None, _Group] = {}
        self._ready: list[tuple[int, int, _Group]] = []  # heaps by rank; entries that are out of date are skipped
        self._unready: list[tuple[int, int, _Group]] = []
        self._batch: OrderedDict[str, Request] = OrderedDict()  # those of the class, in order of arrival
        self._arrivals = itertools.count()
        self._ties = itertools.count()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, requests: Iterable[Request]) -> None:
        """Puts requests at the end of their groups."""
        for request in requests:
            later = request.priority == "batch"
            request.rank = next(self._arrivals) + (_LATER if later else 0)
            request.waits_since = self._clock()
            group = self._groups.setdefault(request.expert, _Group(request.expert))
            with self._changing(group):
                group.queue_of(request)[request.id] = request
            self._count += 1
            if later:
                self._batch[request.id] = request

    def discard(self, request: Request) -> None:
        """Takes a request out, if it is there."""
        group = self._groups.get(request.expert)
        if group is not None and request.id in group.queue_of(request):
            with self._changing(group):
                del group.queue_of(request)[request.id]
            self._batch.pop(request.id, None)
            self._count -= 1

    def of(self, expert: Expert) -> list[Request]:
        """Those that wait for an expert."""
        group = self._groups.get(expert)
        return [] if group is None else [*group.urgent.values(), *group.later.values()]

    def refresh(self, expert: Expert) -> None:
        """The expert has come into memory, or left it."""
        group = self._groups.get(expert)
        if group is not None:
            self._note(group)

    def next(self, running: Collection[Expert]) -> Request | None:
        """The next request that can run now, where `running` are the experts of those that do. It stays here until it
        is discarded."""
        self._promote()
        last = self._last_rank()
        full = self._max_experts is not None and len(running) >= self._max_experts
        passed = []
        found: _Group | None = None
        while found is None and (group := self._first(self._ready, ready=True)) is not None:
            expert = group.expert
            if expert is None or (group.rank <= last and (not full or expert in running)):
                found = group
            else:
                passed.append(heapq.heappop(self._ready))
                if self._is_impatient(group):
                    last = min(last, group.rank)
        for entry in passed:
            heapq.heappush(self._ready, entry)
        return None if found is None else found.first

    def _last_rank(self) -> int:
        """No request for an expert goes on whose rank is above this one's: somebody has waited long enough."""
        passed = []
        last = 2 * _LATER
        while (group := self._first(self._unready, ready=False)) is not None:
            assert group.expert is not None
            if not self._is_impatient(group):
                break
            if not self._residency.has_room(group.expert):
                last = group.rank
                break
            passed.append(heapq.heappop(self._unready))
        for entry in passed:
            heapq.heappush(self._unready, entry)
        return last

    def _is_impatient(self, group: _Group) -> bool:
        assert group.expert is not None
        patience = max(PATIENCE_SECONDS, 2 * self._residency.seconds_to_load(group.expert))
        return self._clock() - group.first.waits_since >= patience

    def _promote(self) -> None:
        """Requests of the class `batch` that have waited for long become urgent, in the order of their arrival."""
        now = self._clock()
        while self._batch:
            request = next(iter(self._batch.values()))
            if now - request.waits_since < BATCH_SECONDS:
                return
            del self._batch[request.id]
            group = self._groups[request.expert]
            with self._changing(group):
                _make_urgent(group, request)

    @contextmanager
    def _changing(self, group: _Group) -> Iterator[None]:
        """Tells the residency of the rank that a group has afterwards."""
        before = group.rank if group else None
        yield
        after = group.rank if group else None
        if after is None:
            del self._groups[group.expert]
        if after != before:
            if group.expert is not None:
                self._residency.want(group.expert, after)
            if after is not None:
                self._note(group)

    def _note(self, group: _Group) -> None:
        heapq.heappush(self._ready if group.ready else self._unready, (group.rank, next(self._ties), group))

    def _first(self, heap: list[tuple[int, int, _Group]], *, ready: bool) -> _Group | None:
        """The group with the least rank, and nothing out of date before it."""
        while heap:
            rank, _, group = heap[0]
            if group and group.rank == rank and group.ready == ready and self._groups.get(group.expert) is group:
                return group
            heapq.heappop(heap)
        return None


def _make_urgent(group: _Group, request: Request) -> None:
    del group.later[request.id]
    request.rank -= _LATER
    group.urgent[request.id] = request
    for other in [other for other in group.urgent.values() if other.rank > request.rank]:
        group.urgent.move_to_end(other.id)
