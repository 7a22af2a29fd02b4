"""Sampling settings of a request: checked, and merged with an expert's own generation config."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from meswitch.errors import RequestError

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "a number, 0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "a number above 0"),
}
_LOGITS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")  # settings that change logits


@dataclass(frozen=True)
class SamplingSettings:
    """What a caller asked for; `None` leaves a setting to the expert's generation config.

    Raises `RequestError` for a value out of range, from `from_keywords` also for an unknown setting.

    >>> SamplingSettings.from_keywords({"temperature": 0.7, "stop": "\\n"}).stop
    ('\\n',)
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole_number("max_new_tokens", self.max_new_tokens, least=1)
        if self.top_k is not None:
            check_whole_number("top_k", self.top_k, least=1)
        for name, (allowed, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not (_is_finite(value) and allowed(value)):
                raise RequestError(f"{name}: expected {expected}, found {value!r}")

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> SamplingSettings:
        """The settings of a call's keyword arguments, without its seed."""
        unknown = sorted(keywords.keys() - cls.__dataclass_fields__.keys())
        if unknown:
            known = ", ".join((*_LOGITS, "seed", "stop"))
            raise RequestError(f"unknown setting: {unknown[0]}", hint=f"known: {known}")
        stop = keywords.get("stop")
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if not all(isinstance(text, str) and text for text in stops):
            raise RequestError(f"stop: expected text that is not empty, or a list of it, found {stop!r}")
        return cls(**{**keywords, "stop": stops})

    def generation_config(self, own: GenerationConfig, *, chat: bool) -> GenerationConfig:
        """`own`, an expert's config, with these settings in front. `do_sample` says whether tokens are drawn.

        Text prompts are greedy unless a setting asks to sample; chats follow the expert's own `do_sample`.
        """
        config = copy.deepcopy(own)
        given = {name: value for name in _LOGITS if (value := getattr(self, name)) is not None}
        temperature = given.pop("temperature", None)
        asks_to_sample = any(name in given for name in ("top_k", "top_p", "min_p"))
        by_default = bool(own.do_sample) if chat else False
        config.do_sample = temperature > 0 if temperature is not None else asks_to_sample or by_default
        if temperature:
            config.temperature = temperature
        for name, value in given.items():
            setattr(config, name, value)
        config.guidance_scale = None  # needs a second prompt
        return config


def check_whole_number(name: str, value: Any, *, least: int) -> int:
    """The value, if it is an integer of at least `least`. Raises `RequestError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RequestError(f"{name}: expected a whole number, {least} or more, found {value!r}")
    return value


def seed_of_each(seeds: Any, count: int) -> list[int | None]:
    """A seed for each of `count` prompts, from one for all or one each. Raises `RequestError`."""
    each = list(seeds) if isinstance(seeds, list | tuple) else [seeds] * count
    if len(each) != count:
        raise RequestError(f"seed: expected one, or one for each of {count} prompts, found {len(each)}")
    return [None if seed is None else check_whole_number("seed", seed, least=0) % 2**63 for seed in each]


def random_generator(seed: int | None) -> torch.Generator:
    """A generator of random numbers on the CPU; without a seed, one that nobody can foresee."""
    return torch.Generator().manual_seed(random.SystemRandom().getrandbits(63) if seed is None else seed)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
