"""Requests that arrive by Zipf's law, from clients that each wait for their answer; every answer is judged."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from meswitch.errors import ExpertNotFoundError, RequestError, RequestTimeoutError

ABSENT, DAMAGED = -1, -2


Answers = dict[int, dict[str, list[int]]]
"""What each expert answers alone: by its number and the prompt, token ids."""


class Truth:
    """What a name stood for, and when: the number of an expert, or `ABSENT`, and also `DAMAGED`. From any thread.

    Whoever changes something says `begins` before and `ended` after: while it happens, both are right.
    """

    def __init__(self, alone: Answers) -> None:
        self._alone = alone
        self._spans: dict[str, list[tuple[int, float, float]]] = {}
        self._lock = threading.Lock()

    def begins(self, name: str, what: int) -> None:
        """From now on the name may stand for this."""
        with self._lock:
            self._spans.setdefault(name, []).append((what, time.monotonic(), float("inf")))

    def ended(self, name: str, what: int) -> None:
        """From now on the name does not stand for this any more."""
        with self._lock:
            now, spans = time.monotonic(), self._spans[name]
            at = next(at for at, (found, _, end) in enumerate(spans) if found == what and end == float("inf"))
            spans[at] = (what, spans[at][1], now)

    def fault(self, name: str, prompt: str, asked: float, found: list[int] | Exception) -> str | None:
        """What is wrong with the answer, or the error, of a request that was made at `asked` and has just ended."""
        now = time.monotonic()
        with self._lock:
            spans = [span for span in self._spans[name] if span[1] <= now and span[2] >= asked]
        stood_for = {what for what, _, _ in spans}
        if isinstance(found, ExpertNotFoundError):
            right = ABSENT in stood_for
        elif isinstance(found, Exception):
            right = DAMAGED in stood_for and not isinstance(found, RequestError | RequestTimeoutError)
        else:
            right = any(self._alone[what][prompt] == found for what in stood_for if what >= 0)
        if right:
            return None
        told = f"{type(found).__name__}: {found}" if isinstance(found, Exception) else f"{found}"
        return f"{name}, asked {now - asked:.3f} s ago, stood for {sorted(stood_for)}: {told}"


@dataclass
class Outcome:
    """What became of requests: counts by kind, seconds of each that was answered, and what was wrong with some."""

    kinds: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    elapsed: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return max(len(self.seconds), 1) / self.elapsed


def arrivals(names: list[str], prompts: dict[str, list[str]], seed: int = 0) -> Iterator[tuple[str, str]]:
    """Names and prompts without end: the n-th name 1/n times as often as the first, each with a prompt of its own."""
    draw = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    while True:
        [name] = draw.choices(names, weights)
        yield name, draw.choice(prompts[name])


def run_clients(
    requests: Iterator[tuple[str, str]],
    ask: Callable[[str, str], list[int]],
    fault: Callable[[str, str, float, list[int] | Exception], str | None],
    *,
    clients: int,
    count: int | None = None,
    seconds: float | None = None,
) -> Outcome:
    """Has clients ask, until so many requests were made or so many seconds are over.

    `ask(name, prompt)` answers or raises. `fault` says what is wrong with that, as `Truth.fault` does.
    """
    outcome, lock, start = Outcome(), threading.Lock(), time.monotonic()
    left = iter(range(count)) if count is not None else iter(int, 1)

    def client() -> None:
        while True:
            with lock:
                if next(left, None) is None or (seconds is not None and time.monotonic() - start > seconds):
                    return
                name, prompt = next(requests)
            asked = time.monotonic()
            try:
                found: list[int] | Exception = ask(name, prompt)
            except Exception as error:
                found = error
            spent = time.monotonic() - asked
            wrong = fault(name, prompt, asked, found)
            with lock:
                if not isinstance(found, Exception):
                    outcome.seconds.append(spent)
                outcome.kinds["answered" if not isinstance(found, Exception) else type(found).__name__] += 1
                if wrong is not None:
                    outcome.faults.append(wrong)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome.elapsed = time.monotonic() - start
    return outcome
