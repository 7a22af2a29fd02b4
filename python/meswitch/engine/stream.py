"""The text of a running request, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from meswitch.engine.request import Answer, Request


class TextStream(Iterator[str]):
    """The text of one request, piece by piece; `answer` is there when they have ended.

    `close` cancels the request, as does forgetting a stream that has not ended. One thread at a time may read it.
    """

    def __init__(self, request: Request, cancel: Callable[[Request], None]) -> None:
        self._request, self._cancel = request, cancel
        self._ended = False

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        piece = self._request.pieces.get()
        if piece is not None:
            return piece
        self._ended = True
        if self._request.error is not None:
            raise self._request.error
        raise StopIteration

    @property
    def answer(self) -> Answer | None:
        """What the request came to; `None` while it runs, and where it failed."""
        return self._request.answer

    @property
    def expert(self) -> str:
        """Who answers: an expert's name, or `"base"`."""
        return "base" if self._request.expert is None else self._request.expert.name

    def close(self) -> None:
        """Cancels the request; the engine drops it after the running step."""
        self._ended = True
        self._cancel(self._request)

    def __del__(self) -> None:
        if not self._ended and not self._request.done.is_set():
            self.close()
