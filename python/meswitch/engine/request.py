"""One request: what was asked, checked; its tokens as text; and the answer it came to."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from meswitch.batching.sampler import SamplingState
from meswitch.engine.text import TextDecoder
from meswitch.errors import EngineClosedError, RequestError, fresh
from meswitch.experts.catalogue import Expert


@dataclass(frozen=True)
class Answer:
    """What a request came to.

    `expert` is `"base"` where the base answered; `route` is the router's `Route` for `expert="auto"`, `None` otherwise.
    `token_ids` are all generated ones, an end-of-sequence token included. `finish_reason`: `"stop"` (end of sequence,
    or a stop string, which `text` leaves out) or `"length"`.
    """

    text: str
    token_ids: list[int]
    expert: str
    route: Any
    finish_reason: str
    prompt_tokens: int = 0


Priority: TypeAlias = Literal["interactive", "batch"]


@dataclass(frozen=True)
class Deadline:
    """When a request must have ended: `at` on the clock of `time.monotonic`, `seconds` after it was made."""

    at: float
    seconds: float


def deadline_of(timeout: Any) -> Deadline | None:
    """The deadline of a request that is made now with this `timeout`, `None` without. Raises `RequestError`."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise RequestError(f"timeout: expected seconds, a number above 0, found {timeout!r}")
    return Deadline(time.monotonic() + timeout, timeout)


def priority_of(value: Any) -> Priority:
    """A priority that was given. Raises `RequestError`."""
    if value not in get_args(Priority):
        raise RequestError(f"priority: expected 'interactive' or 'batch', found {value!r}")
    priority: Priority = value
    return priority


class Request:
    """One prompt on its way through the engine.

    Made on a caller's thread; once submitted it belongs to the engine's thread, which calls `accept` for each token and
    then `end`, once. Any number of threads may read `next_piece` and `result`, before and after the end: each piece of
    text goes to one of them, the end to all. In a forked process, whose parent kept the engine's thread, what has come
    is there, and waiting for more is an `EngineClosedError`.
    """

    _ids = itertools.count()

    def __init__(
        self,
        ids: list[int],
        expert: Expert | None,
        sampling: SamplingState,
        limit: int,
        eos: set[int],
        decoder: TextDecoder,
        route: Any = None,
    ) -> None:
        self.id = f"request-{next(self._ids)}"
        self.ids, self.expert, self.sampling, self.limit, self.eos = ids, expert, sampling, limit, eos
        self.decoder, self.route = decoder, route
        self.priority: Priority = "interactive"
        self.rank = 0  # among those that wait, see `engine.admission`
        self.waits_since = 0.0
        self.arrived = self.admitted = time.monotonic()
        self.first_token: float | None = None  # when it came
        self.deadline: Deadline | None = None
        self.tokens: list[int] = []
        self.ended = False
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self._text: list[str] = []
        self._unread: deque[str] = deque()
        self._changed = threading.Condition()
        self._process = os.getpid()

    # on the engine's thread

    def accept(self, token: int) -> None:
        """Adds a generated token, and hands out the text that it makes certain."""
        self.tokens.append(token)
        self.first_token = self.first_token or time.monotonic()
        if token not in self.eos:
            self._emit(self.decoder.add(token))

    def complete(self) -> Answer:
        """The answer, now that no token follows; hands out the text that was still pending."""
        self._emit(self.decoder.finish())
        stopped = self.decoder.stopped or self.tokens[-1] in self.eos
        name = "base" if self.expert is None else self.expert.name
        reason = "stop" if stopped else "length"
        return Answer("".join(self._text), self.tokens, name, self.route, reason, len(self.ids))

    def end(self, answer: Answer | None, error: BaseException | None = None) -> None:
        """Ends the request with an answer or an error, and wakes everyone who waits."""
        self.answer, self.error = answer, error
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def _emit(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            self._unread.append(piece)
            with self._changed:
                self._changed.notify_all()

    # on any thread

    def next_piece(self) -> str | None:
        """The next piece of text that nobody has read, when it is there; `None` at the end."""
        while True:
            ended = self.ended  # asked first: nothing comes after it
            try:
                return self._unread.popleft()
            except IndexError:
                if ended:
                    return None
            self._wait(lambda: bool(self._unread))

    def result(self) -> Answer:
        """Waits for the answer, or raises the request's error, a new object each time."""
        self._wait(lambda: False)
        if self.error is not None:
            raise fresh(self.error)
        assert self.answer is not None
        return self.answer

    def _wait(self, reached: Callable[[], bool]) -> None:
        """Until the request has ended, or `reached` says so."""
        if self.ended or reached():
            return
        if os.getpid() != self._process:  # asked before the lock, which a thread of the parent may have held
            raise EngineClosedError()
        with self._changed:
            self._changed.wait_for(lambda: self.ended or reached())
