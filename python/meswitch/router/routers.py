"""Routers: which expert a query that names none should go to, or the base where none fits.

router/route.py       a route, labelled prompts, the report on a router
router/embedding.py   the base's own hidden states and a linear head

router = load_router("router/", base="base/")
router.route(["What is 17 * 23?"], embed)[0].expert
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from meswitch.errors import RouterError
from meswitch.huggingface.checkpoint import Checkpoint, resolve
from meswitch.huggingface.models import load_model
from meswitch.huggingface.text import load_tokenizer
from meswitch.progress import ProgressCallback
from meswitch.router.embedding.disk import read_manifest
from meswitch.router.embedding.pooling import embed
from meswitch.router.embedding.router import EmbeddingRouter
from meswitch.router.route import read_examples

KINDS = ("embedding",)


def load_router(path: str | Path, base: str | Path | None = None) -> EmbeddingRouter:
    """The router in the folder `path`, of whatever kind; with `base`, it must have been made for that base.

    Raises `RouterError` for a router that is missing, malformed, of an unknown kind or another base's.
    """
    path = Path(path)
    _check_kind(read_manifest(path).get("kind"))
    return EmbeddingRouter.load(path, None if base is None else Checkpoint.open(base).sample())


def train_router(
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    kind: str = "embedding",
    threshold: float = 0.5,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> EmbeddingRouter:
    """Fit a router to the labelled prompts of `data` and write it into the folder `out`.

    `progress` is told of the prompts run through the base. Raises `RouterError` for an unknown kind, `DataError` for
    data that cannot be learned from.
    """
    _check_kind(kind)
    examples = read_examples(data)
    path = resolve(base)
    embeddings = _embedder(path, progress)([example.prompt for example in examples])
    router = EmbeddingRouter.fit(
        embeddings,
        [example.expert for example in examples],
        threshold=threshold,
        base_fingerprint=Checkpoint.open(path).sample(),
        seed=seed,
    )
    router.save(out)
    return router


def evaluate_router(
    base: str | Path, path: str | Path, data: str | Path, *, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """`report` on the router in the folder `path`, over the labelled prompts of `data`."""
    base = resolve(base)
    router = load_router(path, base)
    examples = read_examples(data, router.experts)
    return router.evaluate(examples, _embedder(base, progress))


def _check_kind(kind: Any) -> None:
    if kind not in KINDS:
        raise RouterError(
            f"expected a router of kind {', '.join(KINDS)}, found {kind!r}",
            hint="this version has no prompt router" if kind == "prompt" else None,
        )


def _embedder(base: Path, progress: ProgressCallback | None) -> Callable[[list[str]], Any]:
    return partial(embed, load_model(base), load_tokenizer(base), progress=progress)
