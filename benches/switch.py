"""What switching between experts costs, as ratios of one run: the tiny family, medians of rounds that take turns.

python benches/switch.py [--rounds 9] [--large 1e9] [--folder DIR] [--json]

resident   a request for another expert than the one before, both in memory, against one for the same
one room   requests for two experts in turn, A B A B, under a budget for one of them, against A A .. B B ..:
           all submitted at once, from two clients that each ask one expert, and from one client
large      tokens a second of running streams while a delta of so many bytes (`--large`), which the page cache does
           not hold, is loaded beside them by the native residency, against the time before and after
gaps       what a running stream waits for its next token, while experts are loaded and long prompts are read
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.mixtures import Mixtures, mixtures
from serving.synthetic import write_delta

from meswitch import _native
from meswitch.delta.directory import TENSORS, Delta
from meswitch.demo.family import cache_folder
from meswitch.engine.engine import Engine

A, B = "a", "b"
SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_budget": "64MiB"}
TOKENS = 8  # of an answer
SITE = 1 << 24  # bytes of a tensor of the large delta


def prompt(length: int = 16) -> list[int]:
    """Tokens of which no other prompt has the same first ones."""
    return [random.randrange(10, 2000) for _ in range(length)]


def ask(engine: Engine, expert: str, tokens: int = TOKENS) -> None:
    engine.generate(prompt(), expert=expert, max_new_tokens=tokens)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def at_once(*works: Callable[[], object]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def resident(made: Mixtures, rounds: int) -> dict[str, float]:
    """Milliseconds of a request of one token after one for the same expert, and after one for another."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    with Engine(made.family.base, {A: made.delta(0), B: made.delta(1)}, **SETTINGS) as engine:
        for at in range(-8, 40 * rounds):  # A A B B A A B B ..
            took = seconds(lambda at=at: ask(engine, (A, A, B, B)[at % 4], 1))
            if at >= 0:
                spent[at % 2 == 0].append(took * 1e3)
    stays, switches = statistics.median(spent[False]), statistics.median(spent[True])
    return {"stays_ms": stays, "switches_ms": switches, "extra_ms": switches - stays}


def one_room(made: Mixtures, rounds: int, count: int = 12) -> dict[str, dict[str, float]]:
    """Seconds in turn / seconds grouped, and loads in turn, for each kind of client."""

    def several(*experts: str) -> None:
        engine.generate([prompt() for _ in experts], expert=list(experts), max_new_tokens=TOKENS)

    def client(*experts: str) -> Callable[[], None]:
        return lambda: [ask(engine, expert) for expert in experts] and None

    each, both = [A] * count, [A, B] * count
    cases: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "at once": (lambda: several(*both), lambda: several(*each, *[B] * count)),
        "two clients": (
            lambda: at_once(client(*each), client(*[B] * count)),
            lambda: (client(*each)(), client(*[B] * count)())[0],
        ),
        "one client": (client(*both), client(*each, *[B] * count)),
    }
    found: dict[str, list[tuple[float, int]]] = {case: [] for case in cases}
    experts = {A: made.delta(0), B: made.delta(1)}
    with Engine(made.family.base, experts, host_budget=made.largest, **SETTINGS) as engine:
        for at in range(rounds + 1):  # the first is not counted
            for case, (in_turn, grouped) in cases.items():
                before = engine.stats()["host"]["loads"]
                first = seconds(in_turn)
                loads = engine.stats()["host"]["loads"] - before
                if at:
                    found[case].append((first / seconds(grouped), loads))
    return {
        case: {
            "in turn / grouped": statistics.median(ratio for ratio, _ in some),
            "loads": statistics.median(loads for _, loads in some),
        }
        for case, some in found.items()
    }


# A large delta beside streams.


@contextmanager
def streams(engine: Engine, experts: list[str]) -> Iterator[None]:
    """One stream of each expert runs all the time."""
    ended = threading.Event()

    def run(expert: str) -> None:
        while not ended.is_set():
            for _ in engine.stream(prompt(), expert=expert, max_new_tokens=400):
                if ended.is_set():
                    break

    clients = [threading.Thread(target=run, args=(expert,)) for expert in experts]
    for one in clients:
        one.start()
    try:
        yield
    finally:
        ended.set()
        for one in clients:
            one.join()


def forget(path: Path) -> None:
    """Has the page cache give a file up."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load_once(delta: Delta) -> None:
    """Loads a delta as the engine does, and lets it go."""
    come = threading.Event()
    residency = _native.Residency(None, "lru", come.set)
    unit = residency.add("large", delta.native)
    residency.want(unit, 0)
    come.wait()
    [(event, _, _, error)] = residency.take_events()
    assert event == "loaded", error
    residency.close()


def large(made: Mixtures, rounds: int, nbytes: int, folder: Path) -> dict[str, float]:
    """Tokens a second beside loads / tokens a second without, and how quickly a load reads."""
    delta = Delta.open(write_delta(folder / "large", -(-nbytes // SITE), SITE))
    ratios, rates = [], []
    experts = {A: made.delta(0), B: made.delta(1)}
    with Engine(made.family.base, experts, **SETTINGS) as engine, streams(engine, [A, B] * 2):

        def rate(work: Callable[[], None]) -> tuple[float, float]:
            before, took = engine.stats()["step_tokens"], seconds(work)
            return (engine.stats()["step_tokens"] - before) / took, took

        _, wait = rate(lambda: load_once(delta))
        before, _ = rate(lambda: time.sleep(wait))
        for _ in range(rounds):
            forget(delta.path / TENSORS)
            beside, took = rate(lambda: load_once(delta))
            after, _ = rate(lambda: time.sleep(wait))
            ratios.append(beside / statistics.mean((before, after)))
            rates.append(delta.memory_bytes / took / 1e9)
            before = after
    return {
        "beside / without": statistics.median(ratios),
        "least": min(ratios),
        "gb_per_second": statistics.median(rates),
    }


# Gaps.


def gaps(made: Mixtures, rounds: int) -> dict[str, float]:
    """The steps and the milliseconds between two tokens of a stream that runs all the time."""
    names = [f"expert-{at}" for at in range(made.count)]
    experts = {name: made.delta(at) for at, name in enumerate(names)}
    steps: list[int] = []
    times: list[float] = []
    ended = threading.Event()

    def disturb() -> None:
        while not ended.is_set():
            engine.generate(prompt(400), expert=random.choice(names[1:]), max_new_tokens=2)

    with Engine(made.family.base, experts, host_budget=2 * made.largest, **SETTINGS) as engine:
        others = [threading.Thread(target=disturb) for _ in range(2)]
        ask(engine, names[0])
        for other in others:
            other.start()
        for _ in range(rounds):
            stream = engine.stream(prompt(), expert=names[0], max_new_tokens=200)
            for gap, took in noted(engine, stream):
                steps.append(gap)
                times.append(took * 1e3)
        ended.set()
        for other in others:
            other.join()
        loads = engine.stats()["host"]["loads"]
    times.sort()
    return {
        "most_steps": max(steps),
        "median_ms": statistics.median(times),
        "p99_ms": times[len(times) * 99 // 100],
        "most_ms": times[-1],
        "tokens": len(times),
        "loads": loads,
    }


def noted(engine: Engine, stream: Any) -> list[tuple[int, float]]:
    """The steps and the seconds from each token of a stream to the next, noted by the engine's thread."""
    request, seen = stream._request, []
    accept = request.accept

    def noting(token: int) -> None:
        seen.append((engine._worker.steps, time.perf_counter()))
        accept(token)

    request.accept = noting
    for _ in stream:
        pass
    return [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(seen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--large", type=float, default=1e9, help="bytes of the large delta")
    parser.add_argument("--folder", type=Path, help="where the large delta is written (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    made, rounds = mixtures(cache_folder() / "mixtures", 6), arguments.rounds
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        result = {
            "resident": resident(made, rounds),
            "one room": one_room(made, rounds),
            "large": large(made, rounds, int(arguments.large), folder),
            "gaps": gaps(made, rounds),
        }
    finally:
        shutil.rmtree(folder)
    rounded = json.loads(json.dumps(result), parse_float=lambda text: round(float(text), 3))
    print(json.dumps(rounded, indent=None if arguments.json else 2))


if __name__ == "__main__":
    main()
