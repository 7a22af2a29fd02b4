"""MoE experts that are in memory because somebody said so, and stay there until they are given up.

    load ── read in the background ── arrived ── tensors ── drop ── the memory is used again

Nobody waits for a read: what a step computes with has arrived before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from meswitch import _native
from meswitch.moe.extents import Extent, Stack
from meswitch.moe.store import Use, numbered, tensor_of

_NORM_WEIGHTS = 1 << 16
"""Widened at a time for a norm: larger tensors that come and go for each MoE expert leave holes in the heap, which made
a process of 3 GB twice as large."""


class Arrival(NamedTuple):
    """A MoE expert of a layer that has arrived, of this `strength` (the norm of its weights), or the `error` for which
    it will not."""

    layer: int
    moe_expert: int
    strength: float
    error: Exception | None = None


class Residents(Protocol):
    """MoE experts that are in memory, under a byte budget, by the number of their layer; on one thread, but `counters`.

    `sizes`: bytes of one MoE expert of each layer, and of none in it more.
    """

    sizes: list[int]

    def load(self, layer: int, moe_expert: int) -> None:
        """Begins to read one that is not in memory. It is read as soon as the budget has room for it."""

    def drop(self, layer: int, moe_expert: int) -> None:
        """Gives the memory of one back, which is loaded or being loaded. No step may be under way."""

    def arrived(self, *, wait: bool = False) -> list[Arrival]:
        """What has arrived since the last call. With `wait`, waits for something that is being read."""

    def counters(self) -> dict[str, Any]:
        """`budget`, `bytes` in memory or being read, `loads`, `failed_loads`, `loaded_bytes`. From any thread."""

    def close(self) -> None:
        """Frees the memory, and ends what is being read."""


class ExactResidents:
    """MoE experts with their exact weights, read from the checkpoint's files into the native store's slots.

    `layers`: what the forward of each module reads them from, in the order of `stacks` (as `find_stacks` has them).
    Raises `OSError` where a file cannot be opened.
    """

    def __init__(self, budget: int, stacks: Mapping[str, Mapping[str, Stack]]) -> None:
        all_stacks = [stack for module in stacks.values() for stack in module.values()]
        files: list[Path] = sorted({file for stack in all_stacks for own in stack.extents for file, _, _ in own})
        self._numbers = {file: number for number, file in enumerate(files)}
        self._native = _native.MoeStore(budget, files)
        self._last_counters: dict[str, Any] | None = None
        self._stacks = [list(module.values()) for module in stacks.values()]
        self.layers = [ResidentLayer(module) for module in self._stacks]
        self.sizes = [sum(self._bytes_of(stack.extents[0]) for stack in module) for module in self._stacks]
        self._matrices: dict[int, tuple[int, int, int]] = {}  # layer, MoE expert and stack of each that is kept
        self._units: dict[tuple[int, int], list[int]] = {}

    def load(self, layer: int, moe_expert: int) -> None:
        units = self._units[layer, moe_expert] = []
        for number, stack in enumerate(self._stacks[layer]):
            unit = self._native.keep(numbered(stack.extents[moe_expert], self._numbers))
            units.append(unit)
            self._matrices[unit] = layer, moe_expert, number

    def drop(self, layer: int, moe_expert: int) -> None:
        units = self._units.pop((layer, moe_expert))
        for unit in units:
            del self._matrices[unit]
        self.layers[layer].remove(moe_expert)
        self._native.give_up(units)

    def arrived(self, *, wait: bool = False) -> list[Arrival]:
        arrivals = []
        for unit, lease, error in self._native.arrived(wait):
            if unit not in self._matrices:  # it was given up since
                continue
            layer, moe_expert, number = self._matrices[unit]
            if lease is None:
                self.drop(layer, moe_expert)
                arrivals.append(Arrival(layer, moe_expert, 0.0, error))
                continue
            own = self.layers[layer]
            own.put(number, moe_expert, tensor_of(lease, self._stacks[layer][number]))
            lease.release()  # the tensor has the memory, and nothing but `drop` takes it away
            if own.has(moe_expert):
                arrivals.append(Arrival(layer, moe_expert, own.norm(moe_expert)))
        return arrivals

    def counters(self) -> dict[str, Any]:
        names = ("budget", "bytes", "allocated_bytes", "loads", "failed_loads", "loaded_bytes")
        if self._last_counters is None:
            with suppress(ValueError):  # it is closed at this moment, on the engine's thread
                counters = self._native.counters()
                return {name: counters[name] for name in names}
        assert self._last_counters is not None, "kept before it was closed"
        return self._last_counters

    def close(self) -> None:
        self._last_counters = self.counters()
        for layer in self.layers:
            layer.clear()
        self._native.close()

    def _bytes_of(self, extents: Sequence[Extent]) -> int:
        return _native.MoeStore.bytes_of(numbered(extents, self._numbers))


class ResidentLayer:
    """The MoE experts in memory of one module, for `ExactExperts`. One that is not there is a `KeyError`."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self._count = len(stacks[0].extents)
        self._matrices: list[_Matrices] = [_Matrices() for _ in stacks]

    def __len__(self) -> int:
        return self._count

    def check_choices(self, choices: int) -> None:
        """Its gate has done so."""

    @contextmanager
    def visit(self, numbers: Sequence[int]) -> Iterator[Callable[[Use], None]]:
        """As `Layer.visit`; the order is that of `numbers`."""
        stacks = iter(self._matrices)

        def run(use: Use) -> None:
            stack = next(stacks)
            for position, number in enumerate(numbers):
                use(position, stack[number])

        yield run

    @contextmanager
    def in_order(self, numbers: Sequence[int]) -> Iterator[Sequence[Any]]:
        """As `Layer.in_order`."""
        yield self._matrices

    def has(self, moe_expert: int) -> bool:
        """Whether all matrices of one are there."""
        return all(moe_expert in matrices for matrices in self._matrices)

    def norm(self, moe_expert: int) -> float:
        """The norm of all weights of one."""
        weights = (matrices[moe_expert].reshape(-1) for matrices in self._matrices)
        pieces = (piece for own in weights for piece in own.split(_NORM_WEIGHTS))
        return math.sqrt(sum(float(piece.float().square().sum()) for piece in pieces))

    def put(self, stack: int, moe_expert: int, matrix: Tensor) -> None:
        """A matrix has arrived."""
        self._matrices[stack][moe_expert] = matrix

    def remove(self, moe_expert: int) -> None:
        """Lets go of what is there of one."""
        for matrices in self._matrices:
            matrices.pop(moe_expert, None)

    def clear(self) -> None:
        """Lets go of everything."""
        for matrices in self._matrices:
            matrices.clear()


class _Matrices(dict[int, Tensor]):
    """A stack of which some matrices are there; a number may be a tensor, as in transformers' own loop."""

    def __getitem__(self, number: Any) -> Tensor:
        return super().__getitem__(int(number))
