"""Every kind of router, one entry each in `KINDS`: how it is trained and loaded, and what it asks of the base.

The functions import their kind when they are called: the command line lists kinds in its help, and torch takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch.errors import RouterError

if TYPE_CHECKING:
    from meswitch.progress import ProgressCallback
    from meswitch.router.protocol import BaseModel, TrainedRouter
    from meswitch.router.route import Example


@dataclass(frozen=True)
class TrainingOptions:
    """What may be asked of a training, whatever the kind.

    `threshold`: the probability below which a prompt goes to the base. `base_fingerprint`: the base's, kept in the
    router. `seed`: of the prompts that are held out.
    """

    threshold: float = 0.5
    base_fingerprint: str | None = None
    seed: int = 0
    progress: ProgressCallback | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of router.

    `train`: labelled prompts, the base and options to a router. `load`: a router's folder and the fingerprint that its
    base must have (`None`: any) to a router. `base_methods`: the methods of `BaseModel` that its routers call.
    """

    train: Callable[[Sequence[Example], BaseModel, TrainingOptions], TrainedRouter]
    load: Callable[[Path, str | None], TrainedRouter]
    base_methods: tuple[str, ...]


def _train_embedding(examples: Sequence[Example], base: BaseModel, options: TrainingOptions) -> TrainedRouter:
    from meswitch.router.embedding.router import EmbeddingRouter

    return EmbeddingRouter.fit(
        base.embed([example.prompt for example in examples]),
        [example.expert for example in examples],
        threshold=options.threshold,
        base_fingerprint=options.base_fingerprint,
        seed=options.seed,
        progress=options.progress,
    )


def _load_embedding(path: Path, base_fingerprint: str | None) -> TrainedRouter:
    from meswitch.router.embedding.router import EmbeddingRouter

    return EmbeddingRouter.load(path, base_fingerprint)


KINDS = {"embedding": Kind(_train_embedding, _load_embedding, base_methods=("embed", "compute"))}
"""The kinds of this version, by name."""

UNSUPPORTED_KINDS = {"prompt": "this version has no prompt router"}
"""Names that are known and refused, with the hint for each."""


def find_kind(name: Any) -> Kind:
    """The kind of this name; raises `RouterError` for one that this version does not have.

    >>> find_kind("embedding").base_methods
    ('embed', 'compute')
    """
    if name not in KINDS:
        raise RouterError(
            f"expected a router of kind {', '.join(KINDS)}, found {name!r}", hint=UNSUPPORTED_KINDS.get(name)
        )
    return KINDS[name]
