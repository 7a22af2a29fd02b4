"""Load, train and evaluate a router of whatever kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meswitch.huggingface.checkpoint import Checkpoint, as_checkpoint
from meswitch.huggingface.models import load_model
from meswitch.huggingface.text import load_tokenizer
from meswitch.progress import ProgressCallback
from meswitch.router.base import LoadedBase
from meswitch.router.folder import MANIFEST, read_manifest
from meswitch.router.kinds import TrainingOptions, find_kind
from meswitch.router.protocol import TrainedRouter
from meswitch.router.route import read_examples, report
from meswitch.target import resolve_target


def load_router(path: str | Path, base: str | Path | Checkpoint | None = None) -> TrainedRouter:
    """The router in the folder `path`, of whatever kind; with `base`, it must have been made for that base.

    Raises `RouterError` for a router that is missing, malformed, of an unknown kind or another base's.
    """
    path = Path(path)
    kind = find_kind(read_manifest(path).get("kind"))
    return kind.load(path, None if base is None else as_checkpoint(base).sample())


def train_router(
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    kind: str = "embedding",
    threshold: float = 0.5,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> TrainedRouter:
    """Train a router on the labelled prompts of `data` (`read_examples`) and write it into the folder `out`.

    `threshold`: the probability, from 0 to 1, below which a prompt goes to the base. `progress` counts the prompts run
    through the base, then the fits of the router.

    Raises `RouterError` for an unknown kind or a threshold out of range, `DataError` for data that cannot be learned
    from, `OutputError` for something other than a router at `out`, `CheckpointError` and `UnsupportedModelError` for
    a base that cannot be loaded.

    >>> train_router("base/", "labelled.jsonl", "router/").experts
    ('base', 'math')
    """
    trainable, target = find_kind(kind), resolve_target(out, replaces=MANIFEST)
    examples = read_examples(data)
    checkpoint = Checkpoint.open(base)
    options = TrainingOptions(threshold, checkpoint.sample(), seed, progress)
    router = trainable.train(examples, _load_base(checkpoint, progress), options)
    router.save(target)
    return router


def evaluate_router(
    base: str | Path, path: str | Path, data: str | Path, *, progress: ProgressCallback | None = None
) -> dict[str, Any]:
    """`route.report` on the router in the folder `path`, over the labelled prompts of `data`.

    `progress` counts the prompts run through the base. Raises `RouterError` as `load_router` does, `DataError` for a
    label that the router does not know.
    """
    checkpoint = Checkpoint.open(base)
    router = load_router(path, checkpoint)
    examples = read_examples(data, router.experts)
    routes = router.route([example.prompt for example in examples], _load_base(checkpoint, progress))
    return report(examples, routes)


def _load_base(base: Checkpoint, progress: ProgressCallback | None) -> LoadedBase:
    return LoadedBase(load_model(base), load_tokenizer(base.path), progress)
