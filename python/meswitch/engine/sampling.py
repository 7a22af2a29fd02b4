"""Sampling settings of a request: checked, and merged with an expert's own generation config."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from operator import index
from typing import Any

import torch
from transformers import GenerationConfig

from meswitch.errors import RequestError
from meswitch.experts.tokenizers import check_unicode

_Check = tuple[Callable[[float], bool], str]
_PENALTY: _Check = (lambda value: 1e-3 <= value <= 1e3, "a number from 0.001 to 1000")  # else logits overflow
_RANGES: dict[str, _Check] = {
    "temperature": (lambda value: value >= 0, "a number, 0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": _PENALTY,
}
_LOGITS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # settings that change logits
_COLDEST = 1e-6
"""Below this temperature a draw is the likeliest token, and dividing by it would overflow."""

_TOP_K = 50
"""transformers' own, where neither the call nor the generation config says another."""


@dataclass(frozen=True)
class SamplingSettings:
    """What a caller asked for; `None` leaves a setting to the expert's generation config.

    Raises `RequestError` for a value out of range, from `from_keywords` also for an unknown setting.

    >>> SamplingSettings.from_keywords({"temperature": 0.7, "stop": "\\n"}).stop
    ('\\n',)
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0)):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_whole_number(name, value, least=least))
        for name, check in _RANGES.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _in_range(name, value, check))

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> SamplingSettings:
        """The settings of a call's keyword arguments, without its seed and its timeout."""
        known = cls.__dataclass_fields__.keys()
        unknown = sorted(keywords.keys() - known)
        if unknown:
            every = ", ".join(sorted({*known, "seed", "timeout"}))
            raise RequestError(f"unknown setting: {unknown[0]}", hint=f"known: {every}")
        return cls(**{**keywords, "stop": _stop_strings(keywords.get("stop"))})

    def generation_config(self, own: GenerationConfig, *, chat: bool) -> GenerationConfig:
        """`own`, an expert's config, with these settings in front. `do_sample` says whether tokens are drawn.

        Text prompts are greedy unless a setting asks to sample; chats follow the expert's own `do_sample`. Raises
        `RequestError` for numbers of `own` that no request could be run with.
        """
        config = copy.deepcopy(own)
        given = {name: value for name in _LOGITS if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            setattr(config, name, value)
        asks_to_sample = any(name in given for name in ("top_k", "top_p", "min_p"))
        config.do_sample = given.get("temperature", 0) > 0 or (
            "temperature" not in given and (asks_to_sample or (chat and bool(own.do_sample)))
        )
        if config.do_sample and config.temperature is not None:
            config.temperature = _in_range("temperature", config.temperature, _RANGES["temperature"])
            config.do_sample = config.temperature >= _COLDEST
        if config.top_k is None:
            config.top_k = _TOP_K
        if config.repetition_penalty is not None:
            _in_range("repetition_penalty", config.repetition_penalty, _PENALTY)
        return config


def check_whole_number(name: str, value: Any, *, least: int) -> int:
    """The value, if it is an integer of at least `least`. Raises `RequestError`."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise RequestError(f"{name}: expected a whole number, {least} or more, found {value!r}")
    return number


def seed_of_each(seeds: Any, count: int) -> list[int | None]:
    """A seed for each of `count` prompts, from one for all or one each. Raises `RequestError`."""
    several = isinstance(seeds, list | tuple | range) or getattr(seeds, "ndim", 0) == 1
    each = list(seeds) if several else [seeds] * count
    if len(each) != count:
        raise RequestError(f"seed: expected one, or one for each of {count} prompts, found {len(each)}")
    return [None if seed is None else check_whole_number("seed", seed, least=0) % 2**63 for seed in each]


def random_generator(seed: int | None) -> torch.Generator:
    """A generator of random numbers on the CPU; without a seed, one that nobody can foresee."""
    return torch.Generator().manual_seed(random.SystemRandom().getrandbits(63) if seed is None else seed)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list | tuple | set | frozenset) or not all(isinstance(s, str) and s for s in stops):
        raise RequestError(f"stop: expected text that is not empty, or a list of it, found {stop!r}")
    for text in stops:
        check_unicode(text, "stop")
    return tuple(stops)


def _in_range(name: str, value: Any, check: _Check) -> float:
    allowed, expected = check
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not allowed(number):
        raise RequestError(f"{name}: expected {expected}, found {value!r}")
    return number
