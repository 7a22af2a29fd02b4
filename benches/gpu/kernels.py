"""Decode products of deltas on a device, beside the base's own and BitDelta's way.

    PYTHONPATH=benches python -m gpu.kernels [--device cuda:0] [--kernels cuda] [--size mistral-7b] [--results FILE]

A launch adds to `y [rows, out]` what the rows' deltas make of `x [rows, in]`. Timed with cold caches, on a GPU as a
captured graph; *gap* is what an empty kernel takes, timed in the same way. *Bandwidth* is the share of what a copy or a
sum reaches in the same run that reading codes and scales once would take. `--device cpu --kernels torch --size tiny`
runs the same code anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu.bitdelta import BitDelta
from gpu.device import Device
from gpu.report import Results, main_of
from gpu.weights import bytes_read, random_site
from torch import Tensor, nn
from torch.nn import functional as F

from meswitch import reference
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.rows import Rows
from meswitch.kernels.select import select_kernels

Weights = dict[str, tuple[tuple[int, ...], int]]
"""By name: the rows of weights that share an input, and their columns."""

SIZES: dict[str, Weights] = {
    "mistral-7b": {
        "q, k, v": ((4096, 1024, 1024), 4096),
        "14336 × 4096": ((14336,), 4096),
        "gate, up": ((14336, 14336), 4096),
        "down": ((4096,), 14336),
    },
    "tiny": {"q, k, v": ((96, 32, 32), 64), "down": ((64,), 160)},
}
BATCHES = {"1 row": [0], "16 rows of 16 experts": list(range(16))}


@dataclass
class Bench:
    """What all cases share. `memory`: bytes a second that the device's memory reaches."""

    device: Device
    kernels: Kernels
    memory: float

    def rate(self, nbytes: int, work: Callable[[], object]) -> dict[str, Any]:
        seconds = self.device.seconds(work)
        return {
            "µs": round(seconds * 1e6, 2),
            "MB": round(nbytes / 1e6, 2),
            "bandwidth": round(nbytes / seconds / self.memory, 3),
            "bandwidth without the gap": round(nbytes / max(seconds - self.device.gap, 1e-9) / self.memory, 3),
            "graph": self.device.captured,
        }

    def delta(self, bits: int, weights: tuple[tuple[int, ...], int], slots: list[int]) -> dict[str, Any]:
        """Deltas of several weights with one input, without the base's product."""
        rows = Rows(slots, self.device.name)
        x = self.activations(len(slots), weights[1])
        linears, nbytes = [], 0
        for number, out in enumerate(weights[0]):
            linear = self.linear(out, weights[1], len(slots))
            for slot in sorted(set(slots)):
                site = random_site(out, weights[1], bits, seed=100 * number + slot)
                linear.set(slot, site)
                nbytes += bytes_read(site)
            linears.append(linear)
        self.kernels.settle()
        return self.rate(nbytes, lambda: [linear(x, rows) for linear in linears])

    def linear(self, out: int, columns: int, tokens: int) -> Any:
        """Of a module whose own product costs nothing: the same tensor every time."""
        y = torch.zeros(tokens, out, dtype=torch.bfloat16, device=self.device.name)
        module = nn.Linear(columns, out, bias=False, device="meta", dtype=torch.bfloat16)
        return self.kernels.linear(module, lambda *_: y, out, columns, many_rows=False)

    def base(self, weights: tuple[tuple[int, ...], int], tokens: int) -> dict[str, Any]:
        """The base's own products of 16 bits, by torch."""
        x = self.activations(tokens, weights[1])
        shapes = [(out, weights[1]) for out in weights[0]]
        matrices = [torch.zeros(shape, dtype=torch.bfloat16, device=self.device.name).normal_() for shape in shapes]
        return self.rate(
            sum(matrix.nbytes for matrix in matrices), lambda: [F.linear(x, matrix) for matrix in matrices]
        )

    def bitdelta(self, weights: tuple[tuple[int, ...], int], tokens: int) -> dict[str, Any]:
        """One bit unpacked to ±1 and multiplied, one delta a token."""
        x = self.activations(tokens, weights[1]).half()
        deltas = [BitDelta(tokens, out, weights[1], self.device.name) for out in weights[0]]
        rate = self.rate(sum(delta.nbytes for delta in deltas), lambda: [delta(x) for delta in deltas])
        return rate | {"with": deltas[0].way}

    def activations(self, tokens: int, columns: int) -> Tensor:
        return torch.zeros(tokens, columns, dtype=torch.bfloat16, device=self.device.name).normal_()


def cases(bench: Bench, sizes: Weights) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is asked first comes first: 2 bits."""
    for bits in sorted(reference.BITS, key=lambda bits: (bits != 2, bits)):
        for batch, slots in BATCHES.items():
            for name, weights in sizes.items():
                yield (
                    f"{bits} bits, {batch}, {name}",
                    lambda bits=bits, weights=weights, slots=slots: bench.delta(bits, weights, slots),
                )
    for batch, slots in BATCHES.items():
        for name, weights in sizes.items():
            yield f"base, {batch}, {name}", lambda weights=weights, slots=slots: bench.base(weights, len(slots))
            yield f"BitDelta's way, {batch}, {name}", lambda w=weights, s=slots: bench.bitdelta(w, len(s))


def measure(results: Results, device: str, kernels: str, size: str) -> None:
    clock = Device(device)
    memory = clock.bandwidth()
    results.note(
        "device",
        {
            "name": torch.cuda.get_device_name() if clock.is_gpu else "processor",
            "torch": torch.__version__,
            "gap µs": round(clock.gap * 1e6, 2),
            "copy GB/s": round(memory["copy"] / 1e9, 1),
            "read GB/s": round(memory["read"] / 1e9, 1),
        },
    )
    bench = Bench(clock, select_kernels(kernels, device), max(memory.values()))
    for name, work in cases(bench, SIZES[size]):
        results.run(name, work)


if __name__ == "__main__":
    main_of(__doc__, "kernels", measure, sizes=list(SIZES))
