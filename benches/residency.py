"""What bookkeeping costs with many experts: no model and hardly any bytes, only names, uses, slots and evictions.

    python benches/residency.py [--experts 2000]

Every expert, all of them one small delta, is opened; asked for, loaded and leased; described; evicted; and removed.
Printed are microseconds an expert of each, for half as many experts and for as many: they should not grow.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from serving.synthetic import write_delta

from meswitch.experts.catalogue import Expert
from meswitch.experts.pool import ExpertPool

LAYERS: Any = SimpleNamespace(
    tied=True,
    check=lambda sites, tied: None,
    vocabulary_of=lambda sites, tied: (10, 10),
    install=lambda slot, sites, tied: None,
    remove=lambda slot: None,
)


class Round:
    """A pool of so many experts, from its first to none; `seconds` of each part."""

    def __init__(self, delta: Path, count: int) -> None:
        self._happened = threading.Event()
        self.pool = ExpertPool(LAYERS, None, budget=None, notify=self._happened.set)
        self.names, self.delta = [f"expert-{at}" for at in range(count)], delta
        parts = (self.open, self.load, self.lease, self.describe, self.evict, self.remove)
        self.seconds = {part.__name__: _seconds(part) for part in parts}
        self.pool.close()

    def open(self) -> None:
        self.experts = [self.pool.add(name, self.delta) for name in self.names]

    def load(self) -> None:
        """Asked for, and in its slot."""
        for rank, expert in enumerate(self.experts):
            self.pool.residency.ask(expert)
            self.pool.residency.want(expert, rank)
        self._until(lambda expert: expert.slot is not None)

    def lease(self) -> None:
        for expert in self.experts:
            assert self.pool.acquire(expert.name) is expert and self.pool.residency.pin(expert)
            self.pool.residency.want(expert, None)
            self.pool.residency.unpin(expert)
            self.pool.release(expert)

    def describe(self) -> None:
        assert len(self.pool.describe()) == len(self.names)

    def evict(self) -> None:
        self.pool.residency.set_budget(0)
        self._until(lambda expert: expert.slot is None)

    def remove(self) -> None:
        for name in self.names:
            self.pool.remove(name)

    def _until(self, reached: Callable[[Expert], bool]) -> None:
        """What the engine's thread does, until something is so of all experts."""
        left = len(self.experts)
        while left:
            self._happened.wait()
            self._happened.clear()
            changed, failed = self.pool.residency.update()
            assert not failed, failed
            left -= sum(map(reached, changed))


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=2000)
    most = parser.parse_args().experts
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))  # each opened delta keeps its file open
    with tempfile.TemporaryDirectory() as folder:
        delta = write_delta(Path(folder) / "delta", 1, 4096)
        for count in (most // 2, most):
            rounds = [Round(delta, count).seconds for _ in range(5)]
            each = {part: statistics.median(one[part] for one in rounds) / count * 1e6 for part in rounds[0]}
            print(json.dumps({"experts": count} | {part: round(us, 1) for part, us in each.items()}), flush=True)


if __name__ == "__main__":
    main()
