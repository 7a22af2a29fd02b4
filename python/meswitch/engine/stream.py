"""The text of a running request, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType

from meswitch.engine.request import Answer, Request
from meswitch.errors import fresh


class TextStream(Iterator[str]):
    """The text of one request, piece by piece; `answer` is there when they have ended.

    A context manager: leaving it, or `close`, cancels a request that still runs, as does forgetting the stream. Several
    threads may read it: each piece goes to one of them, and all of them see the end, be it an error or not. In a forked
    process what has come can be read; waiting for more raises `EngineClosedError`.
    """

    def __init__(self, request: Request, cancel: Callable[[Request], None]) -> None:
        self._request, self._cancel = request, cancel
        self._closed = False

    def __next__(self) -> str:
        piece = None if self._closed else self._request.next_piece()
        if piece is not None and not self._closed:
            return piece
        error = self._request.error
        if error is not None and not self._closed:
            raise fresh(error)
        raise StopIteration

    @property
    def answer(self) -> Answer | None:
        """What the request came to; `None` while it runs, and where it failed or was cancelled."""
        return self._request.answer

    @property
    def expert(self) -> str:
        """Who answers: an expert's name, or `"base"`."""
        return "base" if self._request.expert is None else self._request.expert.name

    def close(self) -> None:
        """Ends the stream for all its readers; the engine drops the request after the running step."""
        self._closed = True
        if not self._request.ended:
            self._cancel(self._request)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if "_closed" in self.__dict__:
            self.close()
