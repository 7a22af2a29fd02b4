"""What eviction policies read, beside a policy that knows the future: no model, no deltas, only traces.

    python benches/policies.py [--seed 0] [--plot docs/policies.svg]

Popularities are Zipf's with the exponent that is named, or 1. *Shifting*: twenty times, half of all experts change
places in popularity. *Scans*: between the requests of others, now and then all experts are asked for in turn. *Bursts*:
32 clients, each of which asks for one expert 20 times on average before it takes another. Sizes are equal, or from 1 to
16 with as many experts in each octave. Printed is a table in Markdown: hit rates at a budget of a fifth of all experts,
and what is read as a multiple of what Belady's MIN reads, as the geometric mean over budgets of 5, 10, 20 and 50 %.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from meswitch import _native

Experts = np.ndarray[Any, np.dtype[np.int64]]
Workload = Callable[[np.random.Generator, int, int], Experts]

SHARES = (0.05, 0.1, 0.2, 0.5)
COUNTS = {64: 100_000, 1000: 200_000}  # experts: requests
UNIT = 1_000_000
OPTIMAL = "optimal"


def zipf(exponent: float) -> Workload:
    def draw(rng: np.random.Generator, count: int, requests: int) -> Experts:
        return rng.permutation(count)[ranks(rng, count, requests, exponent)]

    return draw


def ranks(rng: np.random.Generator, count: int, requests: int, exponent: float = 1.0) -> Experts:
    weights = np.arange(1, count + 1) ** -exponent
    return rng.choice(count, requests, p=weights / weights.sum())


def shifting(rng: np.random.Generator, count: int, requests: int) -> Experts:
    names, pieces = rng.permutation(count), []
    for drawn in np.array_split(ranks(rng, count, requests), 20):
        moved = rng.permutation(count)[: count // 2]
        names[moved] = names[rng.permutation(moved)]
        pieces.append(names[drawn])
    return np.concatenate(pieces)


def scans(rng: np.random.Generator, count: int, requests: int) -> Experts:
    experts = zipf(1.0)(rng, count, requests)
    for start in range(5 * count, requests - 2 * count, 7 * count):
        experts[start : start + 2 * count : 2] = np.arange(count)
    return experts


def bursts(rng: np.random.Generator, count: int, requests: int, clients: int = 32, length: int = 20) -> Experts:
    chosen = zipf(1.0)(rng, count, clients + requests)
    using, experts = chosen[:clients].copy(), np.empty(requests, dtype=np.int64)
    leaves, asking = rng.random(requests) < 1 / length, rng.integers(clients, size=requests)
    for at, client in enumerate(asking):
        if leaves[at]:
            using[client] = chosen[clients + at]
        experts[at] = using[client]
    return experts


WORKLOADS: dict[str, Workload] = {
    "Zipf 0.8": zipf(0.8),
    "Zipf 1.0": zipf(1.0),
    "Zipf 1.2": zipf(1.2),
    "shifting": shifting,
    "scans": scans,
    "bursts": bursts,
}


def sizes(rng: np.random.Generator, count: int, mixed: bool) -> Experts:
    octaves = rng.random(count) * 4 if mixed else np.zeros(count)
    return np.rint(UNIT * 2.0**octaves).astype(np.int64)


def write(path: Path, experts: Experts, nbytes: Experts) -> None:
    lines = [
        json.dumps({"event": "request", "expert": f"expert-{number}", "bytes": int(size)})
        for number, size in enumerate(nbytes)
    ]
    start = json.dumps({"event": "start", "version": 1, "budget": None, "policy": "lru"})
    path.write_text("\n".join([start, *(lines[expert] for expert in experts), ""]))


def traces(seed: int, mixed: bool) -> Iterator[tuple[str, int, _native.Trace]]:
    """Every workload with its name and how many experts it has; their sizes are equal or mixed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        for count, requests in COUNTS.items():
            for number, (name, workload) in enumerate(WORKLOADS.items()):
                rng = np.random.default_rng([seed, count, number])
                write(path, workload(rng, count, requests), sizes(rng, count, mixed))
                yield name, count, _native.Trace(path)


def replay(trace: _native.Trace, share: float, policy: str) -> dict[str, int]:
    budget = round(share * trace.total)
    return trace.optimal(budget) if policy == OPTIMAL else trace.replay(budget, policy)


def hit_rate(counts: dict[str, int]) -> float:
    return 100 * counts["hits"] / counts["requests"]


def rates(trace: _native.Trace) -> list[str]:
    """Hit rates of every policy and the optimum with a fifth of all experts in memory."""
    return [f"{hit_rate(replay(trace, 0.2, policy)):.1f}" for policy in (*_native.policies(), OPTIMAL)]


def read(trace: _native.Trace) -> list[str]:
    """What every policy reads as a multiple of what the optimum reads, over all budgets."""
    logs = {
        policy: np.log([replay(trace, share, policy)["bytes_read"] for share in SHARES])
        for policy in (*_native.policies(), OPTIMAL)
    }
    return [f"{np.exp(np.mean(logs[policy] - logs[OPTIMAL])):.2f}" for policy in _native.policies()]


def draw(seed: int, path: Path) -> None:
    """Hit rates by budget of three workloads of 1000 experts of one size."""
    import matplotlib
    from matplotlib.figure import Figure

    shown, shares = ("Zipf 1.0", "shifting", "bursts"), np.geomspace(0.01, 1, 9)
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = dict(zip(shown, figure.subplots(1, len(shown), sharey=True), strict=True))
    for name, count, trace in traces(seed, mixed=False):
        if name in panels and count == 1000:
            for policy in (*_native.policies(), OPTIMAL):
                hits = [hit_rate(replay(trace, share, policy)) for share in shares]
                style: dict[str, Any] = {"color": "black", "linestyle": "--"} if policy == OPTIMAL else {"marker": "."}
                panels[name].plot(100 * shares, hits, label=policy, **style)
            panels[name].set(title=name, xlabel="memory, % of all experts", xscale="log", ylim=(0, 101))
            panels[name].set_xticks([1, 10, 100], ["1", "10", "100"])
            panels[name].minorticks_off()
            panels[name].grid(alpha=0.3)
    panels[shown[0]].set(ylabel="in memory when asked for, %")
    panels[shown[0]].legend()
    with matplotlib.rc_context({"svg.hashsalt": "meswitch", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw hit rates instead")
    options = parser.parse_args()
    if options.plot is not None:
        draw(options.seed, options.plot)
        return
    policies = _native.policies()
    columns = [f"{name}: hits" for name in (*policies, OPTIMAL)]
    columns += [f"{name}: read, {kind} sizes" for kind in ("equal", "mixed") for name in policies]
    print(f"| workload | experts | {' | '.join(columns)} |\n{'|---' * (len(columns) + 2)}|")
    for (name, count, equal), (*_, mixed) in zip(traces(options.seed, False), traces(options.seed, True), strict=True):
        cells = [name, f"{count}", *rates(equal), *read(equal), *read(mixed)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
