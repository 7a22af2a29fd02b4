"""What the engine needs of a router, and what a router may ask of the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor

from meswitch.router.route import Route

T = TypeVar("T")
EmbedFunction: TypeAlias = Callable[[list[str]], Tensor]
"""Prompts to their embeddings: `BaseModel.embed` as a plain function."""


class BaseModel(Protocol):
    """The base as a router may ask it, with no expert active.

    Each method runs the base where its implementation says: `router.base.LoadedBase` on the calling thread, the
    engine's on the engine's thread between two steps, while the caller waits. Another kind of router may need another
    method, such as scores of continuations of a prompt; `Kind.base_methods` says which ones a kind calls.
    """

    def embed(self, prompts: list[str]) -> Tensor:
        """The embeddings of prompts, `float32 [n, 2 · hidden]`.

        Raises `RequestError` for an empty prompt, and for a token that the base has no row for.
        """
        ...

    def compute(self, function: Callable[[], T]) -> T:
        """What `function` returns, run where the base runs. A router's arithmetic goes through it, in pieces of a few
        milliseconds: torch on another thread would start threads of its own beside those of the base."""
        ...


class Router(Protocol):
    """What the engine needs of a router. Any object with this method will do."""

    def route(self, prompts: Sequence[str], base: BaseModel | EmbedFunction) -> Sequence[Route]:
        """Where each prompt goes, in order. `base` is a `BaseModel`, or its `embed` alone as a plain function."""
        ...


class TrainedRouter(Router, Protocol):
    """A router of one of the kinds in `router.kinds`: trained, and stored in a folder."""

    @property
    def kind(self) -> str:
        """Its name in `KINDS`."""
        ...

    @property
    def experts(self) -> tuple[str, ...]:
        """The labels it chooses between, `"base"` among them where it was trained with that label."""
        ...

    @property
    def base_fingerprint(self) -> str | None:
        """The fingerprint of the base it was trained for; `None` fits any base."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the router's folder, replacing a router that is there."""
        ...

    def summary(self) -> dict[str, Any]:
        """What a training reports: `{"kind", "experts"}` and the kind's own numbers, ready for JSON."""
        ...


def compute(base: BaseModel | EmbedFunction, function: Callable[[], T]) -> T:
    """`function` by `base.compute`, or called here where `base` is a plain function.

    >>> compute(lambda prompts: None, lambda: 3)
    3
    """
    run: Any = getattr(base, "compute", None)
    result: T = function() if run is None else run(function)
    return result


def embed_prompts(base: BaseModel | EmbedFunction, prompts: Sequence[str]) -> Tensor:
    """The embeddings of prompts by `base.embed`, or by `base` itself where it is a plain function.

    >>> import torch
    >>> embed_prompts(lambda prompts: torch.zeros(len(prompts), 8), ["a", "b"]).shape
    torch.Size([2, 8])
    """
    embed: Any = getattr(base, "embed", base)
    embeddings: Tensor = embed(list(prompts))
    return embeddings
