"""Tokens to text, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextTail:
    """Tokens to text, one at a time: never half a character, never a part of a stop string.

    `tokenizer` may be none where prompts are token ids: the text is then empty.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.stopped = False
        self._window = self._read = 0  # text before `_read` is out; `_window` gives decoding its context
        self._known = self._held = ""

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        self.ids.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd") or len(text) <= len(self._known):
            return ""
        new = text[len(self._known) :]
        self._window, self._read = self._read, len(self.ids)
        self._known = self._decode(self._window)
        return self._release(new, last=False)

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        return "" if self.stopped else self._release(self._decode(self._window)[len(self._known) :], last=True)

    def _decode(self, start: int) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(self.ids[start:], skip_special_tokens=True))

    def _release(self, new: str, *, last: bool) -> str:
        self._held += new
        found = [at for at in (self._held.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self.stops), default=0)
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(out) :]
        return out


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
