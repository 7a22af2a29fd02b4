"""Distillation of the scales: a delta's codes stay, its scales learn what the fine-tune would have said.

Row scales, column scales and `u` are trained as stored value · exp(θ), whole model at once against the fine-tune's
logits, or block by block against its hidden states; the text's own next tokens count a little beside its logits. The
first gradients say at which rate, which falls to a tenth over the run. Text that is not trained on picks the best
scales seen, each rounded to the float16 that is stored, and judges the outcome by KL(fine-tune ‖ expert): it is never
worse there than what it started from.

    distill ─ Windows (text) ─┬─ Whole  (two models in float32)      ─┬─ Learner, Rows, Weight (one site's scales)
                              └─ Blocks (one block of two models,    ─┘  descend (Adam, best seen)
                                         Stream, Heads, Journal)

Joint training of row and column scales: arXiv 2512.19720; training one-bit deltas' scales at all: arXiv 2402.10193;
a little of the text itself beside a teacher's answers: arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from meswitch.compression.distillation.blocks import Blocks
from meswitch.compression.distillation.descent import Recipe
from meswitch.compression.distillation.journal import Journal
from meswitch.compression.distillation.learner import Learner, relative_error
from meswitch.compression.distillation.options import DistillOptions, Method
from meswitch.compression.distillation.whole import Whole
from meswitch.compression.distillation.windows import Windows
from meswitch.delta.directory import Delta
from meswitch.delta.target import refuse_overwriting
from meswitch.errors import FormatError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import skeleton
from meswitch.progress import ProgressCallback

_BYTES_A_WEIGHT = 13  # of a whole model: both in float32, the expert rebuilt, a byte a code


@dataclass(frozen=True)
class Distillation:
    """What a distillation did: how, steps and tokens trained on, KL(fine-tune ‖ expert) in nats per held-out token."""

    method: str
    steps: int
    tokens: int
    kl_before: float
    kl_after: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as they are.

        >>> Distillation("whole", 1, 1024, 0.5, 0.25, 2.0).to_json()["kl_after"]
        0.25
        """
        return asdict(self)


def distill(
    base: str | Path,
    finetune: str | Path,
    delta: str | Path,
    out: str | Path,
    data: str | Path,
    options: DistillOptions = DistillOptions(),
    *,
    progress: ProgressCallback | None = None,
) -> Distillation:
    """Trains the scales of `delta` to predict as the fine-tune does on the text of `data`, and writes them to `out`.

    `base` and `finetune` are folders or hub ids, `data` a `.txt` or `.jsonl` file (see `huggingface.text.read_texts`).
    The loss is KL(fine-tune ‖ expert) + 0.2 √KL · NLL of the text, in nats a token, on logits (method `blocks`: on the
    head's alone; blocks match hidden states). The best scales on held-out windows win, and none is worse there than
    before. Equal arguments give equal scales. `out` may be `delta` itself. Method `whole` leaves parameters alone that
    transformers fuses when it loads them (MoE experts).

    `blocks` writes down every block that it finished, in `.NAME.distilling` beside `out`; after an interruption the
    same call goes on from there.

    Raises `DataError` for too little text or a token that the models have no row for, `BaseMismatchError`,
    `FormatError` (a fine-tune with another vocabulary, something else at `out`), `NonFiniteError` for predictions that
    are not finite, and `UnsupportedModelError` for a model that `blocks` cannot run a block at a time (fused MoE
    experts).

    >>> report = distill("base/", "math/", "experts/math", "experts/math", "prompts.jsonl")  # doctest: +SKIP
    >>> report.kl_before, report.kl_after  # doctest: +SKIP
    (0.0041, 0.0007)
    """
    start, tuned, checkpoint = time.perf_counter(), Checkpoint.open(finetune), Checkpoint.open(base)
    refuse_overwriting(Path(out))
    count = options.steps * options.batch
    windows = Windows.draw(data, tuned.path, options.window, count, options.seed, options.heldout_share)
    with closing(Delta.open(delta)) as source:
        source.check_base(checkpoint)
        windows.check(_vocabulary(tuned, source), data)
        recipe = _recipe(options, source)
        chosen = _fitting(source) if options.method == "auto" else options.method
        journal = None
        if chosen == "blocks":
            journal = Journal(Path(out), _about(checkpoint, tuned, source, Path(data), options))
        run = (
            Whole(checkpoint, tuned, source, windows, recipe)
            if journal is None
            else Blocks(checkpoint, tuned, source, windows, recipe, journal)
        )
        before, after, taken = run.train(progress)
        tokens = taken * min(options.batch, len(windows.train)) * options.window
        better = after < before
        spent = Distillation(chosen, taken, tokens, before, after if better else before, time.perf_counter() - start)
        _write(source, Path(out), list(run.learners.values()) if better else [], checkpoint, tuned, spent)
        if journal is not None:
            journal.close()
    return spent


def _vocabulary(finetune: Checkpoint, delta: Delta) -> int:
    """Rows of the embedding. Raises `FormatError` where the delta is of a fine-tune with others."""
    models: list[Any] = [skeleton(folder) for folder in (finetune.path, delta.path)]
    wanted, found = (int(model.get_input_embeddings().num_embeddings) for model in models)
    if wanted != found:
        raise FormatError(
            f"expected the fine-tune's vocabulary of {wanted}, found {found} in the delta",
            hint="distil against the fine-tune that was compressed",
        )
    return wanted


def _fitting(delta: Delta) -> Method:
    """The method that half of the memory that is free has room for."""
    return "whole" if _BYTES_A_WEIGHT * delta.parameters <= psutil.virtual_memory().available / 2 else "blocks"


def _recipe(options: DistillOptions, delta: Delta) -> Recipe:
    """Without a rate, the largest that suits the delta's codes: codes that make up for each other bear less."""
    settings = delta.manifest["settings"]
    compensated = isinstance(settings, dict) and settings.get("compensated")
    fastest = options.rate or (0.02 if compensated else 0.05)
    return Recipe(options.steps, options.batch, fastest, finds=options.rate is None, seed=options.seed)


def _about(base: Checkpoint, finetune: Checkpoint, delta: Delta, data: Path, options: DistillOptions) -> dict[str, Any]:
    """Everything that decides the outcome of `blocks`."""
    return {
        "scheme": 5,
        "base": base.sample(),
        "finetune": finetune.sample(),
        "delta": delta.manifest,
        "data": sha256(data.read_bytes()).hexdigest(),
        "options": asdict(replace(options, method="blocks")),
    }


def _write(
    delta: Delta, out: Path, learners: list[Learner], base: Checkpoint, finetune: Checkpoint, spent: Distillation
) -> None:
    """The delta with the learned scales, and the relative errors that its sites have now."""
    learners = [learner for learner in learners if learner.has_codes]
    tensors = {name: value for learner in learners for name, value in learner.tensors().items()}
    errors = {learner.site.name: relative_error(learner, base, finetune) for learner in learners}
    told = {key: value for key, value in spent.to_json().items() if key != "seconds"}
    settings = delta.manifest["settings"]
    settings = {**(settings if isinstance(settings, dict) else {}), "distilled": told}
    delta.rewrite(out, tensors, errors, settings)
