"""One request: what was asked, checked; its tokens as text; and the answer it came to."""

from __future__ import annotations

import itertools
import queue
import threading
from dataclasses import dataclass
from typing import Any

from meswitch.batching.sampler import SamplingState
from meswitch.engine.text import TextDecoder
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


class Request:
    """One prompt on its way through the engine.

    Made on a caller's thread; from `Worker.submit` on it belongs to the engine's thread, which calls `accept` for each
    token and then `finish` or `fail`, once. The caller reads `pieces`, which end with `None`, or waits for `result`.
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
        self.tokens: list[int] = []
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.done = threading.Event()
        self.cancelled = False
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self._text: list[str] = []

    def accept(self, token: int) -> None:
        """Adds a generated token, and hands out the text that it makes certain."""
        self.tokens.append(token)
        if token not in self.eos:
            self._emit(self.decoder.add(token))

    def finish(self, reason: str) -> None:
        """Ends the request with an answer."""
        self._emit(self.decoder.finish())
        reason = "stop" if self.decoder.stopped else reason
        name = "base" if self.expert is None else self.expert.name
        self.answer = Answer("".join(self._text), self.tokens, name, self.route, reason, len(self.ids))
        self._end()

    def fail(self, error: BaseException) -> None:
        """Ends the request with an error."""
        self.error = error
        self._end()

    def result(self) -> Answer:
        """Waits for the answer, or raises the request's error."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer

    def _emit(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            self.pieces.put(piece)

    def _end(self) -> None:
        self.pieces.put(None)
        self.done.set()
