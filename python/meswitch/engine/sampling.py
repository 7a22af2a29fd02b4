"""Sampling settings of a request, checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from meswitch.errors import RequestError

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
