"""An engine with many experts on a device: memory, decode against the models one by one, switching.

    PYTHONPATH=benches python -m gpu.engine [--device cuda:0] [--kernels cuda] [--size mistral-7b] [--results FILE]

Base and deltas are noise of a real model's shapes, in memory where there is a file system of it; sixteen experts are
one directory of 2 bits under sixteen names, and each has memory of its own. *Token* is what a token costs after the
first one. *Memory's share* is the time that reading base and deltas once would take at the rate of a copy or a sum in
the same run, by the time that a token took. `--device cpu --kernels cpu --size tiny` runs the same code anywhere.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import SHAPES, write
from engine import PROMPT, ask, seconds
from gpu.device import Device
from gpu.report import Results, main_of
from gpu.weights import write_random_delta

from meswitch.engine.engine import Engine

EXPERTS, BITS, TOKENS, ROUNDS = 16, 2, 16, 5
MEMORY = Path("/dev/shm")


@dataclass
class Bench:
    """`delta`: bytes of an expert. `read`: bytes of the base that a token reads. `memory`: bytes a second."""

    base: Path
    experts: dict[str, Path]
    device: Device
    kernels: str
    delta: int
    read: int
    memory: float

    @property
    def rounds(self) -> int:
        return min(ROUNDS, self.device.rounds)

    def engine(self, device_experts: float) -> Engine:
        """With room for so many experts on the device, and for all of them in the host's memory."""
        budget: dict[str, Any] = {}
        if self.device.is_gpu:
            budget["device_budget"] = int(device_experts * self.delta)
        host = int(1.2 * len(self.experts) * self.delta)
        return Engine(
            self.base, self.experts, device=self.device.name, kernels=self.kernels, host_budget=host, **budget
        )

    def token(self, engine: Engine, experts: list[str], tokens: int = TOKENS) -> float:
        """Median seconds of a step after the first one."""

        def once() -> float:
            first, more = (seconds(lambda count=count: ask(engine, PROMPT, experts, count)) for count in (1, tokens))
            return (more - first) / (tokens - 1)

        once()
        return statistics.median(once() for _ in range(self.rounds))

    def decode(self, engine: Engine, results: Results) -> None:
        """A case each for the base, one expert, and a request for each of all experts in one batch."""
        names, alone = list(self.experts), 0.0
        cases = {"base, 1 request": ["base"], "1 expert, 1 request": names[:1]}
        cases[f"{len(names)} experts, a request each"] = names

        def measured(asked: list[str]) -> dict[str, Any]:
            nonlocal alone
            spent, deltas = self.token(engine, asked), 0 if asked == ["base"] else len(asked)
            if not deltas:
                alone = spent  # what one of the models would take
            return {
                "ms a token": round(spent * 1e3, 3),
                "tokens/s": round(len(asked) / spent, 1),
                "memory's share": round((self.read + deltas * self.delta) / self.memory / spent, 3),
                "against the models one by one": round(len(asked) * alone / spent, 3) if alone else None,
            }

        for name, asked in cases.items():
            results.run(name, lambda asked=asked: measured(asked))

    def switching(self, engine: Engine) -> dict[str, Any]:
        """Requests of one token for experts in turn, under a budget for one on the device, all in the host's memory."""
        names = list(self.experts)[:4]
        for name in names:
            ask(engine, PROMPT, [name], 1)
        stays, switches = [], []
        for _ in range(self.rounds):
            for name in names:
                switches.append(seconds(lambda name=name: ask(engine, PROMPT, [name], 1)))
                stays.append(seconds(lambda name=name: ask(engine, PROMPT, [name], 1)))
        switch, stay, pinned = statistics.median(switches), statistics.median(stays), self.device.copy_rate()
        extra = max(switch - stay, 1e-9)
        return {
            "request ms": round(stay * 1e3, 2),
            "after a switch ms": round(switch * 1e3, 2),
            "delta MB": round(self.delta / 1e6, 1),
            "copied GB/s": round(self.delta / extra / 1e9, 2),
            "pinned copy GB/s": round(pinned / 1e9, 2),
            "share of a pinned copy": round(self.delta / extra / pinned, 3),
        }


def made(root: Path, device: Device, kernels: str, size: str) -> Bench:
    weights = write(root / "base", size, finetune=False)
    shapes = SHAPES[size]
    delta = write_random_delta(root / "base", root / "expert", BITS)
    experts = {f"expert-{at}": root / "expert" for at in range(EXPERTS)}
    read = 2 * (weights - shapes.vocabulary * shapes.hidden)
    return Bench(root / "base", experts, device, kernels, delta, read, max(device.bandwidth().values()))


def room(size: str) -> str | None:
    """A folder in memory, if there is one with room for base and expert."""
    need = 3 * sum(rows[0] * rows[-1] for _, rows in SHAPES[size].parameters())
    return str(MEMORY) if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > need else None


def measure(results: Results, device: str, kernels: str, size: str) -> None:
    clock = Device(device)
    with tempfile.TemporaryDirectory(prefix="meswitch-", dir=room(size)) as folder:
        start = time.monotonic()
        bench = made(Path(folder), clock, kernels, size)
        results.note("files written", {"in": folder, "s": round(time.monotonic() - start, 1)})
        results.run("decode", lambda: decode(results, bench))
        results.run("switching", lambda: switching(bench))


def decode(results: Results, bench: Bench) -> dict[str, Any]:
    before, start = bench.device.memory(), time.monotonic()
    with bench.engine(EXPERTS + 0.5) as engine:
        loaded, base = time.monotonic() - start, bench.device.memory() - before

        def memory() -> dict[str, Any]:
            ask(engine, PROMPT, list(bench.experts), 2)
            return {
                "load s": round(loaded, 1),
                "base and KV cache GB": round(base / 1e9, 2),
                f"{EXPERTS} experts GB": round((bench.device.memory() - before - base) / 1e9, 2),
                "their tensors GB": round(EXPERTS * bench.delta / 1e9, 2),
            }

        results.run("memory", memory)
        bench.decode(engine, results)
    return {"s": round(time.monotonic() - start, 1)}


def switching(bench: Bench) -> dict[str, Any]:
    with bench.engine(1.5) as engine:
        return bench.switching(engine)


if __name__ == "__main__":
    main_of(__doc__, "engine", measure, sizes=["mistral-7b", "tiny"])
