"""The matrices of MoE experts that are in memory, under a byte budget.

    chosen in a step ──> visit: those in memory, then the others as they are read ──> tensors, for as long as one visit

The native store reads and evicts; a `Layer` is its side of one module.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from meswitch import _native
from meswitch.errors import BudgetError
from meswitch.moe.extents import Extent, Stack

_log = logging.getLogger(__name__)

Use = Callable[[int, Tensor], None]
"""Called with a MoE expert's position among those visited, and one of its matrices."""


class MoeStore:
    """The MoE experts of one model: `layers` by module.

    `budget`: bytes that are never exceeded. `stacks`: by module, as `find_stacks` has them. `choices`: how many MoE
    experts a token has at least, in one layer.
    Raises `BudgetError` where the budget is below what one token needs in one layer, and `OSError`.
    """

    def __init__(self, budget: int, stacks: Mapping[str, Mapping[str, Stack]], choices: int = 1) -> None:
        all_stacks = [stack for module in stacks.values() for stack in module.values()]
        files = sorted({file for stack in all_stacks for extents in stack.extents for file, _, _ in extents})
        numbers = {file: number for number, file in enumerate(files)}
        self._budget = budget
        self._largest = max(
            sum(_native.MoeStore.bytes_of(numbered(stack.extents[0], numbers)) for stack in module.values())
            for module in stacks.values()
        )
        self.check_choices(choices)
        self._native = _native.MoeStore(budget, files)
        self._last_counters: dict[str, Any] | None = None
        self.layers = {
            name: Layer(
                self,
                [
                    [
                        self._native.add(f"{name}.{leaf}[{number}]", numbered(extents, numbers))
                        for number, extents in enumerate(stack.extents)
                    ]
                    for leaf, stack in module.items()
                ],
                list(module.values()),
            )
            for name, module in stacks.items()
        }

    @property
    def native(self) -> _native.MoeStore:
        return self._native

    def check_choices(self, choices: int) -> None:
        """Raises `BudgetError` where the budget has no room for what one token chooses in one layer."""
        least = choices * self._largest
        if self._budget < least:
            raise BudgetError(
                f"moe_budget: expected at least {least} bytes, which the {choices} MoE experts of a token take in one "
                f"layer, found {self._budget}"
            )

    def start_trace(self, path: Path) -> None:
        """Writes to a file from now on which matrices are needed, read and evicted, each by its name such as
        `model.layers.3.mlp.experts.gate_up_proj[17]`. Raises `OSError` where there can be none."""
        self._native.start_trace(path)

    def log_trace_error(self) -> None:
        """Says, once, that the trace has ended, where it has."""
        if (error := self._native.take_trace_error()) is not None:
            _log.warning("the trace of MoE experts has ended: %s", error)

    def counters(self) -> dict[str, Any]:
        """Counts since the start, and bytes; those of the end once it is closed. May be called from any thread.

        `hits`, `misses`: matrices of MoE experts that a layer needed in a step, each once, by whether they were in
        memory; also by layer. `bytes`: of those in memory or being read; `allocated_bytes`: of slots, free ones too.
        """
        if self._last_counters is None:
            layers = {name: {"hits": layer.hits, "misses": layer.misses} for name, layer in self.layers.items()}
            with suppress(ValueError):  # it is closed at this moment, on the engine's thread
                return {**self._native.counters(), "layers": layers}
        assert self._last_counters is not None, "kept before it was closed"
        return self._last_counters

    def close(self) -> None:
        """Frees the memory."""
        self._last_counters = self.counters()
        self._native.close()


class Layer:
    """The MoE experts of one module. `hits`, `misses`: as in `MoeStore.counters`.

    A tensor that is handed out is over the store's memory, and nothing may have it when the next is asked for: where
    the budget has no room beside it, that would wait for ever. Whatever reads raises `CheckpointError` where a file
    was written to since it was opened, and `OSError`.
    """

    def __init__(self, store: MoeStore, units: Sequence[Sequence[int]], stacks: Sequence[Stack]) -> None:
        self._store, self._units, self._stacks = store, units, stacks
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._units[0])

    def check_choices(self, choices: int) -> None:
        """`MoeStore.check_choices`."""
        self._store.check_choices(choices)

    @contextmanager
    def visit(self, numbers: Sequence[int]) -> Iterator[Callable[[Use], None]]:
        """Gives a function that visits one stack after the other: it calls another with the matrix of each of some MoE
        experts, once, in the order in which they are in memory."""
        turns = [[units[number] for number in numbers] for units in self._units]
        stacks = iter(self._stacks)
        with self._begin(turns) as native:

            def run(use: Use) -> None:
                stack = next(stacks)
                while (found := native.next()) is not None:
                    position, lease = found
                    try:
                        use(position, tensor_of(lease, stack))
                    finally:
                        lease.release()

            yield run

    @contextmanager
    def in_order(self, numbers: Sequence[int]) -> Iterator[list[StackInOrder]]:
        """Gives the stacks, of which each of some MoE experts must be read once: for one MoE expert after the other, in
        the order of `numbers`, its matrix of each stack in turn."""
        turns = [[units[number]] for number in numbers for units in self._units]
        with self._begin(turns) as native:
            reader = _Reader(native)
            try:
                yield [StackInOrder(reader, stack) for stack in self._stacks]
            finally:
                reader.release()

    def in_memory(self) -> Tensor:
        """Which MoE experts are in memory now, with all of their matrices: booleans `[MoE experts]`."""
        return torch.tensor([self._store.native.has(units) for units in self._units]).all(dim=0)

    @contextmanager
    def _begin(self, turns: Sequence[Sequence[int]]) -> Iterator[_native.Visit]:
        self._store.log_trace_error()
        native = self._store.native.visit(turns)
        self.hits += native.hits
        self.misses += sum(map(len, turns)) - native.hits
        try:
            yield native
        finally:
            native.close()


class StackInOrder:
    """A stack `[MoE experts, ...]` that is read where it is indexed."""

    def __init__(self, reader: _Reader, stack: Stack) -> None:
        self._reader, self._stack = reader, stack

    def __getitem__(self, number: Any) -> Tensor:
        return tensor_of(self._reader.next(), self._stack)


class _Reader:
    """One lease after another."""

    def __init__(self, visit: _native.Visit) -> None:
        self._visit = visit
        self._lease: _native.MoeMatrix | None = None

    def next(self) -> _native.MoeMatrix:
        self.release()
        found = self._visit.next() or self._visit.next()  # nothing between two turns
        assert found is not None, "one more than was said"
        self._lease = found[1]
        return self._lease

    def release(self) -> None:
        if self._lease is not None:
            self._lease.release()


def numbered(extents: Sequence[Extent], numbers: Mapping[Path, int]) -> list[tuple[int, int, int]]:
    """Extents as the native store takes them: a file by its number."""
    return [(numbers[file], start, size) for file, start, size in extents]


def tensor_of(lease: _native.MoeMatrix, stack: Stack) -> Tensor:
    """A matrix of a stack, over the store's memory."""
    return from_dlpack(lease.dlpack()).view(stack.dtype).view(stack.shape)
