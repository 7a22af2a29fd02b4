"""Resident experts on a device with memory of its own, and host memory behind it, with a budget each.

wanted ── host: loaded from disk ── device: room ── installed ── resident
                evicted: stays on the device              evicted: out of the layers, perhaps still in host memory
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from meswitch import _native
from meswitch.errors import BudgetError
from meswitch.experts.catalogue import Expert
from meswitch.experts.residency import Installation, Residency, named_budget
from meswitch.layers.install import ExpertLayers


class DeviceResidency(Residency):
    """The resident experts of one engine, of whose deltas the layers have copies on a device.

    An expert leaves the layers when another needs its room on the device, and is put there again without a read from
    disk while host memory has it. Both budgets have the same policy and ranks. A delta is reckoned on the device as in
    host memory, which is never less than it takes. A trace is of the device.
    """

    budget_name = "device_budget"

    def __init__(
        self,
        layers: ExpertLayers,
        host_budget: int | None,
        device_budget: int,
        notify: Callable[[], object],
        *,
        policy: str = "lru",
    ) -> None:
        super().__init__(layers, device_budget, notify, policy=policy)
        self._host = _native.Residency(host_budget, policy, notify)
        self._of_host: dict[int, Expert] = {}
        self._ranks: dict[Expert, int] = {}  # of those that requests wait for
        self._last_host_counters: dict[str, int | None] | None = None

    # from any thread

    def enter(self, expert: Expert) -> None:
        with named_budget(expert, Residency.budget_name, self._host):
            host_unit = self._host.add(expert.name, expert.delta.native)
        try:
            with named_budget(expert, self.budget_name, self._native):
                expert.unit = self._native.reserve(expert.name, expert.nbytes)
        except BudgetError:
            self._host.retire(host_unit)
            raise
        expert.host_unit = host_unit
        self._experts[expert.unit] = self._of_host[expert.host_unit] = expert

    def leave(self, expert: Expert) -> None:
        self._ranks.pop(expert, None)
        if expert.host_unit is not None:
            self._host.retire(expert.host_unit)
            self._of_host.pop(expert.host_unit, None)
        super().leave(expert)

    def ask(self, expert: Expert) -> bool:
        resident = super().ask(expert)
        if not resident:
            self._host.ask(self._host_unit(expert))
        return resident

    def want(self, expert: Expert, rank: int | None) -> None:
        if expert.host_unit is None or expert.unit is None:
            return
        if rank is None:
            self._ranks.pop(expert, None)
        else:
            self._ranks[expert] = rank
        if rank is None or expert.slot is None:
            self._host.want(expert.host_unit, rank)
        if rank is None or expert.slot is not None or self._is_in_host_memory(expert):
            self._native.want(expert.unit, rank)

    def prefetch(self, expert: Expert) -> None:
        if expert.slot is not None:
            return
        if self._is_in_host_memory(expert):
            super().prefetch(expert)
        else:
            self._host.prefetch(self._host_unit(expert))

    def has_room(self, expert: Expert) -> bool:
        return super().has_room(expert) or self._host.place(self._host_unit(expert)) == "loading"

    def set_budget(self, budget: int | None) -> None:
        self._host.set_budget(budget)

    def where(self, expert: Expert) -> str:
        if expert.slot is not None:
            return "device"
        return "host" if expert.host_unit is not None and self._is_in_host_memory(expert) else "disk"

    def counters(self) -> dict[str, int | None]:
        if self._last_host_counters is None:
            with suppress(ValueError):  # it is closed at this moment, on the engine's thread
                return self._host.counters()
        assert self._last_host_counters is not None, "kept before it was closed"
        return self._last_host_counters

    def device_counters(self) -> dict[str, int | None]:
        return super().counters()

    # on the engine's thread

    def close(self) -> None:
        self._last_host_counters = self._host.counters()
        super().close()
        self._host.close()
        self._of_host.clear()

    def _take_events(self, changed: list[Expert], failed: list[tuple[Expert, Exception]]) -> None:
        for event, unit, seconds, error in self._host.take_events():
            expert = self._of_host.get(unit)
            if expert is None:
                continue
            if event == "failed":
                assert error is not None
                self._ranks.pop(expert, None)
                self._native.want(self._unit(expert), None)
                failed.append((expert, error))
            elif event == "loaded":
                self._count_load(expert, seconds)
                self._find_room(expert)
        super()._take_events(changed, failed)

    def _find_room(self, expert: Expert) -> None:
        """For one that host memory has now."""
        if expert.slot is not None or any(other.expert is expert for other in self._installing):
            return
        if self._native.place(self._unit(expert)) == "host":  # room was found before host memory had it again
            self._begin(expert)
        elif (rank := self._ranks.get(expert)) is not None:
            self._native.want(self._unit(expert), rank)
        else:
            self._native.prefetch(self._unit(expert))

    def _arrive(self, expert: Expert, seconds: float) -> None:
        """There is room for it on the device."""
        self._begin(expert)

    def _finish(self, done: Installation) -> list[Expert]:
        if done.expert.host_unit is not None:
            self._host.want(done.expert.host_unit, None)  # its room there is for others, if they need it
        return super()._finish(done)

    def _hold(self, expert: Expert) -> tuple[Any, ...]:
        room = super()._hold(expert)
        if not room:
            return ()
        copy = self._host.pin(self._host_unit(expert))
        if copy is None:  # it has left host memory since: `_find_room` once it is there again
            room[0].release()
            self._host.want(self._host_unit(expert), self._ranks.get(expert))
            return ()
        return (*room, copy)

    def _is_in_host_memory(self, expert: Expert) -> bool:
        return self._host.place(self._host_unit(expert)) == "host"

    def _host_unit(self, expert: Expert) -> int:
        assert expert.host_unit is not None, "entered"
        return expert.host_unit
