"""Who answers a prompt that names nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from meswitch.engine.worker import Worker
from meswitch.errors import RequestError, RouterError
from meswitch.experts.settings import ModelSettings
from meswitch.router.base import embed
from meswitch.router.protocol import BaseModel, Router

T = TypeVar("T")


def expert_of_each(expert: str | Sequence[str] | None, count: int, *, routed: bool) -> list[str]:
    """A name for each of `count` prompts; where none is given, `"auto"` with a router and `"base"` without."""
    if expert is None:
        expert = "auto" if routed else "base"
    names = [expert] * count if isinstance(expert, str) else list(expert)
    if len(names) != count:
        raise RequestError(f"expert: expected one, or one for each of {count} prompts, found {len(names)}")
    return names


class Routing:
    """Sends the prompts that ask for `"auto"` through the engine's router, together, on the caller's thread.

    `base`: what the router may ask; it may be used from any thread.
    """

    def __init__(self, router: Router | None, base: BaseModel) -> None:
        self._router, self._base = router, base

    @property
    def available(self) -> bool:
        return self._router is not None

    def resolve(self, names: list[str], text_of: Callable[[int], str]) -> list[tuple[str, Any]]:
        """(expert's name, route) of every prompt; the route is `None` where no router was asked.

        `text_of(i)` is what the router reads of prompt `i`; the base answers where that is blank. Raises `RouterError`
        without a router.
        """
        resolved: list[tuple[str, Any]] = [(name, None) for name in names]
        automatic = [i for i, name in enumerate(names) if name == "auto"]
        if automatic and self._router is None:
            raise RouterError('expert="auto" needs a router', hint="pass router=... to Engine, or name an expert")
        texts = {}
        for i in automatic:
            resolved[i] = ("base", None)
            if (text := text_of(i)).strip():
                texts[i] = text
        if self._router is None or not texts:
            return resolved
        routes = self._router.route(list(texts.values()), self._base)
        for i, route in zip(texts, routes, strict=True):
            resolved[i] = ("base" if route.abstained else route.expert, route)
        return resolved


def open_router(router: Router | str | Path | None, base: Path) -> Router | None:
    """The router in a folder, which must have been made for `base`; any other object as it is."""
    if not isinstance(router, str | os.PathLike):
        return router
    from meswitch.router.routers import load_router

    return load_router(Path(router), base)


@dataclass(frozen=True)
class ServedBase:
    """The base as a router may ask it, from any thread; also its `embed` as a plain function.

    Prompts become tokens on the caller's thread. What uses the model runs between two steps of the engine, by no
    expert, one batch of prompts at a time.
    """

    worker: Worker
    settings: ModelSettings

    def embed(self, prompts: list[str]) -> Tensor:
        tokenizer = self.settings.required_tokenizer.inner
        return embed(self.worker.model, tokenizer, prompts, run=self.worker.call_plain)

    def compute(self, function: Callable[[], T]) -> T:
        return self.worker.call(function)

    __call__ = embed
