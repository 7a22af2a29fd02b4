"""Token ids to text, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextDecoder:
    """Decodes token by token: never half a character, never a part of a stop string.

    `tokenizer` may be `None` where prompts are token ids: the text is then empty. `stops` are texts at which the
    request ends; they are left out, and `stopped` says that one was met.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.stopped = False
        # Ids from `_context` on are decoded together, since a token's text depends on those before it. The text of ids
        # before `_emitted` has been handed out.
        self._context = self._emitted = 0
        self._context_text = ""
        self._pending = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that `token` makes certain."""
        self.ids.append(token)
        text = self._decode(self._context)
        if text.endswith("\ufffd") or len(text) <= len(self._context_text):
            return ""
        new = text[len(self._context_text) :]
        self._context, self._emitted = self._emitted, len(self.ids)
        self._context_text = self._decode(self._context)
        return self._up_to_stop(new, last=False)

    def finish(self) -> str:
        """The text that was still pending, now that no token follows."""
        if self.stopped:
            return ""
        return self._up_to_stop(self._decode(self._context)[len(self._context_text) :], last=True)

    def _decode(self, start: int) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(self.ids[start:], skip_special_tokens=True))

    def _up_to_stop(self, new: str, *, last: bool) -> str:
        """The pending text and `new`, up to the first stop string or to what may become one."""
        self._pending += new
        places = [place for place in (self._pending.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.stopped = True
            return self._pending[: min(places)]
        kept = 0 if last else max((_overlap(self._pending, stop) for stop in self.stops), default=0)
        certain = self._pending[: len(self._pending) - kept]
        self._pending = self._pending[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`.

    >>> _overlap("answer: <e", "<end>")
    2
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
