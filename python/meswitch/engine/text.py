"""Token ids to text, one at a time: characters, then spaces, then stop strings.

The pieces joined are what the tokenizer decodes of all ids together, up to a stop string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meswitch.engine.spaces import SpaceCleaner
from meswitch.experts.tokenizers import Tokenizer

_WINDOW = 32
"""The most ids that are decoded together for one more. Text never depends on so many, so that a token costs the same
however many have come before, also where they decode to nothing."""

_KEPT = 8
_UNKNOWN = "\ufffd"  # bytes that are no character, or not yet


class TextDecoder:
    """Decodes token by token: never half a character, never a part of a stop string.

    `tokenizer` may be `None` where prompts are token ids: the text is then empty. `stops` are texts at which the
    request ends; they are left out, and `stopped` says that one was met. A stop string may hold special tokens, which
    the text does not show.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._hidden: Mapping[int, str] = {} if tokenizer is None else tokenizer.hidden
        self.stops, self._marks = _marked(stops, self._hidden)
        self.stopped = False
        # Ids are decoded together with those before them, since a token's text depends on them. Of the window's text
        # `_shown` characters have been handed out; the first `_settled` ids were decoded before the last ones came.
        self._window: list[int] = []
        self._settled = self._shown = 0
        self._cleaner = SpaceCleaner() if tokenizer is not None and tokenizer.cleans_spaces else None
        self._pending = ""  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """The text that `token` makes certain."""
        if self._tokenizer is None:
            return ""
        if token in self._hidden:
            mark = self._marks.get(token)
            return "" if mark is None else self._up_to_stop(self._cleaned(mark), last=False)
        return self._up_to_stop(self._cleaned(self._decoded(token)), last=False)

    def finish(self) -> str:
        """The text that was still pending, now that no token follows."""
        if self.stopped or self._tokenizer is None:
            return ""
        rest = self._tokenizer.decode(self._window)[self._shown :]
        cleaned = rest if self._cleaner is None else self._cleaner.add(rest) + self._cleaner.finish()
        return self._up_to_stop(cleaned, last=True)

    def _decoded(self, token: int) -> str:
        """The characters that `token` completes."""
        assert self._tokenizer is not None
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # What ends in unknown bytes may become a character yet; so many of them will not.
        long = len(self._window) >= _WINDOW
        certain = text[:-3] if long and text.endswith(_UNKNOWN) else text.rstrip(_UNKNOWN)
        new, self._shown = certain[self._shown :], max(self._shown, len(certain))
        if new and len(certain) == len(text):
            del self._window[: self._settled]
            self._settled = len(self._window)
            self._shown = len(self._tokenizer.decode(self._window))
        elif long:
            unshown = max(len(text) - self._shown, 0)
            del self._window[:-_KEPT]
            self._settled = 0
            self._shown = max(len(self._tokenizer.decode(self._window)) - unshown, 0)
        return new

    def _cleaned(self, text: str) -> str:
        return text if self._cleaner is None else self._cleaner.add(text)

    def _up_to_stop(self, new: str, *, last: bool) -> str:
        """The pending text and `new`, up to the first stop string or to what may become one."""
        self._pending += new
        places = [place for place in (self._pending.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self.stopped = True
            return self._unmarked(self._pending[: min(places)])
        kept = 0 if last else max((_overlap(self._pending, stop) for stop in self.stops), default=0)
        certain = self._pending[: len(self._pending) - kept]
        self._pending = self._pending[len(certain) :]
        return self._unmarked(certain)

    def _unmarked(self, text: str) -> str:
        return text.translate({ord(mark): None for mark in self._marks.values()}) if self._marks else text


def _marked(stops: Sequence[str], hidden: Mapping[int, str]) -> tuple[tuple[str, ...], dict[int, str]]:
    """The stop strings, with one character in the place of each special token, and those characters by id.

    Strings that hold special tokens are also kept as they are: a model may write them letter by letter. One that is a
    special token is left alone: its id ends the request. Characters are taken where Unicode will never have any.
    """
    marks: dict[int, str] = {}
    texts = dict.fromkeys(stops)
    for stop in set(stops) - set(hidden.values()):
        found = [(token, text) for token, text in hidden.items() if text and text in stop]
        marked = stop
        for token, text in sorted(found, key=lambda pair: -len(pair[1])):
            if text in marked:
                marks.setdefault(token, chr(0xFDD0 + len(marks) % 32))
                marked = marked.replace(text, marks[token])
        texts[marked] = None
    if marks:  # between the parts of a stop string no other special token may stand
        marks = {token: marks.get(token, "\uffff") for token in hidden}
    return tuple(texts), marks


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`.

    >>> _overlap("answer: <e", "<end>")
    2
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
