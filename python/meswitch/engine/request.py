"""One request: what was asked, checked; its tokens as text; and the answer it came to."""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from meswitch import scheduling
from meswitch.errors import RequestError
from meswitch.experts import Expert


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


class Request:
    """One prompt on its way through the engine. `pieces` ends with none; then there is `answer` or
    `error`."""

    _ids = itertools.count()

    def __init__(self, ids: list[int], expert: Expert | None, draw: scheduling.Draw, limit: int, eos: set[int]) -> None:
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


SHAPING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def whole(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"{name}: expected a whole number, {least} or more, found {value!r}")
    return value


def _number(name: str, value: Any, allowed: Callable[[float], bool], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not allowed(value):
        raise RequestError(f"{name}: expected {expected}, found {value!r}")
    return float(value)


def check_seed(seed: Any) -> int | None:
    return None if seed is None else whole("seed", seed, least=0) % 2**63


def check_sampling(given: dict[str, Any]) -> dict[str, Any]:
    """Every sampling setting, checked; none where not given. Raises `RequestError`."""
    unknown = sorted(given.keys() - {"max_new_tokens", "stop", *SHAPING})
    if unknown:
        raise RequestError(f"unknown setting: {unknown[0]}", hint="known: " + ", ".join((*SHAPING, "seed", "stop")))
    checked: dict[str, Any] = dict.fromkeys(SHAPING)
    checked["max_new_tokens"] = whole("max_new_tokens", given.get("max_new_tokens", 256), least=1)
    stop = given.get("stop")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    if not all(isinstance(text, str) and text for text in stops):
        raise RequestError(f"stop: expected text that is not empty, or a list of it, found {stop!r}")
    checked["stop"] = stops
    if given.get("top_k") is not None:
        checked["top_k"] = whole("top_k", given["top_k"], least=1)
    for name, allowed, expected in (
        ("temperature", lambda v: v >= 0, "a number, 0 or more"),
        ("top_p", lambda v: 0 < v <= 1, "a number above 0, at most 1"),
        ("min_p", lambda v: 0 <= v <= 1, "a number from 0 to 1"),
        ("repetition_penalty", lambda v: v > 0, "a number above 0"),
    ):
        if given.get(name) is not None:
            checked[name] = _number(name, given[name], allowed, expected)
    return checked
