"""One request: what was asked, checked; its tokens as text; and the answer it came to."""

from __future__ import annotations

import itertools
import queue
import threading
from dataclasses import dataclass
from typing import Any

from meswitch.batching.sampler import Draw
from meswitch.engine.text import TextTail
from meswitch.experts.catalogue import Expert


@dataclass(frozen=True)
class Answer:
    """What a request came to.

    `expert` is `"base"` where the base answered; `route` is the router's `Route` for `expert="auto"`.
    `token_ids` are all generated ones, an end-of-sequence token included. `finish_reason`: `"stop"` (end of
    sequence, or a stop string, which `text` leaves out) or `"length"`.
    """

    text: str
    token_ids: list[int]
    expert: str
    route: Any
    finish_reason: str
    prompt_tokens: int = 0


class Request:
    """One prompt on its way through the engine. `pieces` ends with none; then there is `answer` or
    `error`."""

    _ids = itertools.count()

    def __init__(self, ids: list[int], expert: Expert | None, draw: Draw, limit: int, eos: set[int]) -> None:
        self.id = f"request-{next(self._ids)}"
        self.ids, self.expert, self.draw, self.limit, self.eos = ids, expert, draw, limit, eos
        self.route: Any = None
        self.tail = TextTail(None, ())
        self.tokens: list[int] = []
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.done = threading.Event()
        self.cancelled = False
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self._text: list[str] = []

    def accept(self, token: int) -> None:
        self.tokens.append(token)
        if token not in self.eos:
            self._emit(self.tail.push(token))

    def _emit(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            self.pieces.put(piece)

    def finish(self, reason: str) -> None:
        self._emit(self.tail.finish())
        reason = "stop" if self.tail.stopped else reason
        name = "base" if self.expert is None else self.expert.name
        self.answer = Answer("".join(self._text), self.tokens, name, self.route, reason, len(self.ids))
        self._end()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self.pieces.put(None)
        self.done.set()

    def result(self) -> Answer:
        self.done.wait()
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer
