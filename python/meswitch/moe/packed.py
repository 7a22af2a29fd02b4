"""Resident MoE experts in few bits, out of a quantized model: more of them in the same budget.

load ── sites of a MoE expert, read and checked in the background ── kernels' tables ── drop ── the memory is free
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Event
from typing import Any

from meswitch import _native
from meswitch.delta.directory import Delta
from meswitch.huggingface.names import StackPlace
from meswitch.kernels.rows import BASE_SLOT
from meswitch.layers.moe import MoeWrapper
from meswitch.moe.resident import Arrival
from meswitch.site import Site


class PackedResidents:
    """`Residents` whose matrices stay packed. Its strengths are all 1: the norms of packed weights are not known.

    `layers`: each layer's module, empty at first; `sites`: all sites of its MoE experts, with their places. What is
    wrong with the bytes of one is the `ChecksumError` of its arrival.
    """

    def __init__(
        self, budget: int, copies: Delta, layers: Sequence[MoeWrapper], sites: Sequence[Mapping[StackPlace, Site]]
    ) -> None:
        self._happened = Event()
        self._native = _native.Residency(budget, "lru", self._happened.set)
        self._last_counters: dict[str, Any] | None = None
        self._copies, self._layers = copies, layers
        self._names: list[dict[int, list[tuple[str, str]]]] = []  # of each layer's MoE experts: sites and their stacks
        self.sizes: list[int] = []
        for own in sites:
            names: dict[int, list[tuple[str, str]]] = {}
            for place, site in own.items():
                names.setdefault(place.moe_expert, []).append((site.name, place.parameter.rpartition(".")[2]))
            self._names.append(names)
            self.sizes.append(max(sum(map(self._bytes_of, each)) for each in names.values()))
        self._coming: dict[int, tuple[int, int, str, str]] = {}  # by unit: layer, MoE expert, site and stack
        self._units: dict[tuple[int, int], list[int]] = {}

    def load(self, layer: int, moe_expert: int) -> None:
        units = self._units[layer, moe_expert] = []
        for site, stack in self._names[layer][moe_expert]:
            unit = self._native.add(site, self._copies.native, site)
            units.append(unit)
            self._coming[unit] = layer, moe_expert, site, stack
        for unit in units:
            self._native.want(unit, 0)

    def drop(self, layer: int, moe_expert: int) -> None:
        self._layers[layer].clear_moe_expert(BASE_SLOT, moe_expert)
        for unit in self._units.pop((layer, moe_expert)):
            self._coming.pop(unit, None)
            self._native.retire(unit)

    def arrived(self, *, wait: bool = False) -> list[Arrival]:
        if wait:
            self._happened.wait()
        self._happened.clear()
        arrivals = []
        for event, unit, _, error in self._native.take_events():
            if unit not in self._coming:  # it was given up since
                continue
            layer, moe_expert, site, stack = self._coming[unit]
            if event == "loaded":
                error = self._put(layer, unit, site, stack)
            if error is not None:
                self.drop(layer, moe_expert)
                arrivals.append(Arrival(layer, moe_expert, 1.0, error))
                continue
            del self._coming[unit]
            if not any(other in self._coming for other in self._units[layer, moe_expert]):
                arrivals.append(Arrival(layer, moe_expert, 1.0))
        return arrivals

    def counters(self) -> dict[str, Any]:
        names = ("budget", "bytes", "loads", "failed_loads", "loaded_bytes")
        if self._last_counters is None:
            with suppress(ValueError):  # it is closed at this moment, on the engine's thread
                counters = self._native.counters()
                return {name: counters[name] for name in names}
        assert self._last_counters is not None, "kept before it was closed"
        return self._last_counters

    def close(self) -> None:
        self._last_counters = self.counters()
        for layer in self._layers:
            layer.clear(BASE_SLOT)
        self._native.close()

    def _put(self, layer: int, unit: int, site: str, stack: str) -> Exception | None:
        """Puts a site that is in memory into the tables, or says why it cannot be."""
        lease = self._native.pin(unit)
        tensors = None if lease is None else lease.tensors()
        assert lease is not None and tensors is not None, "nothing takes it away"
        try:
            self._layers[layer].set(BASE_SLOT, stack, self._copies.site_of(site, tensors))
        except Exception as error:  # tensors that do not fit each other
            return error
        finally:
            lease.release()  # the tables have the memory
        return None

    def _bytes_of(self, site: tuple[str, str]) -> int:
        return self._copies.native.site_memory_bytes(site[0])
