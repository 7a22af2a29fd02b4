"""What the requests for one expert have come to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

LATEST = 256
"""Percentiles are over so many requests or loads, the latest ones."""


def _latest() -> deque[float]:
    return deque(maxlen=LATEST)


@dataclass
class ExpertCounts:
    """Counts since the start, and how long the latest took, in seconds.

    The engine's thread and callers' count; any thread may read.
    """

    requests: int = 0
    tokens: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: deque[float] = field(default_factory=_latest)
    wait_seconds: deque[float] = field(default_factory=_latest)
    first_token_seconds: deque[float] = field(default_factory=_latest)
    tokens_per_second: deque[float] = field(default_factory=_latest)

    def count(self, *, tokens: int, waited: float, first: float, rest: float) -> None:
        """Counts an answered request: its tokens, and the seconds until it was in the batch, until its first token
        came, and from then on until the last."""
        self.requests += 1
        self.tokens += tokens
        self.wait_seconds.append(waited)
        self.first_token_seconds.append(first)
        if tokens > 1 and rest > 0:
            self.tokens_per_second.append((tokens - 1) / rest)

    def describe(self) -> dict[str, Any]:
        """Counts, and the median and 99th percentile of what was measured."""
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "hits": self.hits,
            "misses": self.misses,
            "loads": self.loads,
            "evictions": self.evictions,
            "load_ms": percentiles(self.load_seconds, 1e3),
            "queue_ms": percentiles(self.wait_seconds, 1e3),
            "first_token_ms": percentiles(self.first_token_seconds, 1e3),
            "tokens_per_second": percentiles(self.tokens_per_second),
        }


def percentiles(values: Iterable[float], scale: float = 1.0) -> dict[str, float] | None:
    """`p50` and `p99`: values that were measured, `None` where none was.

    >>> percentiles([3.0, 1.0, 2.0])
    {'p50': 2.0, 'p99': 3.0}
    """
    ordered = sorted(tuple(values))
    if not ordered:
        return None
    return {f"p{share}": ordered[min(len(ordered) * share // 100, len(ordered) - 1)] * scale for share in (50, 99)}
