"""What bookkeeping costs with many experts: no model, no deltas, only names, uses, slots, bytes and evictions.

    python benches/residency.py [--experts 2000]

Every expert is added, admitted and released; then `describe` is asked, and one expert that needs the whole budget
evicts all others. Printed are milliseconds in all, and microseconds an expert, for half as many and for as many: the
latter should not grow.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from meswitch.experts.pool import ExpertPool

LAYERS: Any = SimpleNamespace(
    tied=True,
    check=lambda sites, tied: None,
    vocabulary_of=lambda sites, tied: (10, 10),
    install=lambda slot, sites, tied: None,
    remove=lambda slot: None,
)


def opened(path: Path) -> Any:
    return SimpleNamespace(nbytes=int(path.name), bpw=2.0, sites={}, close=lambda: None)


def seconds(count: int) -> float:
    pool = ExpertPool(LAYERS, None, budget=100 * count, open_delta=opened)
    start = time.perf_counter()
    for at in range(count):
        pool.add(f"expert-{at}", Path("100"))
        expert = pool.acquire(f"expert-{at}")
        assert pool.residency.admit(expert)
        pool.residency.unpin(expert)
        pool.release(expert)
    pool.describe()
    assert pool.residency.admit(pool.add("huge", Path(str(100 * count)))) and pool.residency.evictions == count
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=2000)
    most = parser.parse_args().experts
    for count in (most // 2, most):
        spent = min(seconds(count) for _ in range(3))
        print(json.dumps({"experts": count, "ms": round(spent * 1e3, 1), "us_each": round(spent / count * 1e6, 1)}))


if __name__ == "__main__":
    main()
