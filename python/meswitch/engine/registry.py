"""Every request that was accepted and has not ended, and how many did."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable
from typing import NamedTuple

from meswitch.engine.request import Answer, Request
from meswitch.errors import OverloadedError, RequestCancelledError, RequestTimeoutError, fresh


class Counts(NamedTuple):
    """Requests since the start: `accepted`, of which `running` are in the batch and others have ended, each in one of
    three ways."""

    accepted: int = 0
    running: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def waiting(self) -> int:
        return self.accepted - self.running - self.finished - self.failed - self.cancelled


class Registry:
    """The requests that were accepted and have not ended.

    Callers `accept`; the rest is the engine's thread's. A request ends here and nowhere else, once, with an error of
    its own. `counts` is replaced as a whole and may be read from any thread without waiting. Each call costs the same
    however many requests there are.
    """

    def __init__(self, max_waiting: int | None = None) -> None:
        self.max_waiting = max_waiting
        self.counts = Counts()
        self._open: dict[str, Request] = {}
        self._running: set[str] = set()
        self._deadlines: list[tuple[float, str]] = []  # a heap; those of requests that have ended are skipped
        self._lock = threading.RLock()  # held for a few operations only

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request: Request) -> bool:
        return request.id in self._open

    def check_room(self, count: int) -> None:
        """Raises `OverloadedError` where `count` more requests would be too many to wait."""
        waiting = self.counts.waiting
        if self.max_waiting is not None and count and waiting + count > self.max_waiting:
            raise OverloadedError(
                f"expected at most {self.max_waiting} waiting requests (max_waiting), found {waiting} and {count} more",
                hint="ask again later, or with fewer prompts at once",
            )

    def accept(self, requests: Iterable[Request]) -> None:
        """Takes all of `requests`, or raises `OverloadedError`."""
        requests = list(requests)
        with self._lock:
            self.check_room(len(requests))
            self._open.update((request.id, request) for request in requests)
            self.counts = self.counts._replace(accepted=self.counts.accepted + len(requests))
            for request in requests:
                if request.deadline is not None:
                    heapq.heappush(self._deadlines, (request.deadline.at, request.id))

    def start(self, request: Request) -> None:
        """The request is in the step that begins."""
        if request.id not in self._running:
            with self._lock:
                self._running.add(request.id)
                self.counts = self.counts._replace(running=len(self._running))

    def finish(self, request: Request, answer: Answer) -> None:
        """Ends a request with its answer."""
        if self._leave(request, finished=1):
            request.end(answer)

    def fail(self, request: Request, error: BaseException) -> None:
        """Ends a request with a copy of `error`."""
        if self._leave(request, failed=1):
            request.end(None, fresh(error))

    def cancel(self, request: Request) -> None:
        """Ends a request that nobody wants any more."""
        if self._leave(request, cancelled=1):
            request.end(None, RequestCancelledError("the request was cancelled"))

    def fail_all(self, error: BaseException) -> None:
        """Ends every request that is still open with a copy of `error`."""
        while self._open:
            self.fail(next(iter(self._open.values())), error)

    def _leave(self, request: Request, *, finished: int = 0, failed: int = 0, cancelled: int = 0) -> bool:
        """Counts a request as ended, before anyone hears of it; false where it has ended before."""
        with self._lock:
            if self._open.pop(request.id, None) is None:
                return False
            self._running.discard(request.id)
            before = self.counts
            self.counts = Counts(
                before.accepted,
                len(self._running),
                before.finished + finished,
                before.failed + failed,
                before.cancelled + cancelled,
            )
            return True

    def expired(self, now: float) -> list[tuple[Request, RequestTimeoutError]]:
        """The requests whose time is over at `now`, with the error to end them with."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            with self._lock:
                request = self._open.get(heapq.heappop(self._deadlines)[1])
            if request is not None and request.deadline is not None:
                seconds = f"{request.deadline.seconds:g}"
                late.append((request, RequestTimeoutError(f"the request did not end within {seconds} seconds")))
        if len(self._deadlines) > 64 + 2 * len(self._open):
            with self._lock:
                self._deadlines = [entry for entry in self._deadlines if entry[1] in self._open]
                heapq.heapify(self._deadlines)
        return late
