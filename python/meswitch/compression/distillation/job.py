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
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import psutil

from meswitch.compression.distillation.blocks import Blocks
from meswitch.compression.distillation.descent import Recipe
from meswitch.compression.distillation.journal import Journal
from meswitch.compression.distillation.learner import Learner, relative_error
from meswitch.compression.distillation.whole import Whole
from meswitch.compression.distillation.windows import Windows
from meswitch.delta.directory import Delta
from meswitch.delta.target import refuse_overwriting
from meswitch.errors import FormatError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import skeleton
from meswitch.progress import ProgressCallback

Method = Literal["auto", "whole", "blocks"]
METHODS = ("auto", "whole", "blocks")
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
    *,
    method: Method = "auto",
    steps: int = 120,
    window: int = 128,
    batch: int = 8,
    rate: float | None = None,
    seed: int = 0,
    heldout_share: float = 0.1,
    progress: ProgressCallback | None = None,
) -> Distillation:
    """Trains the scales of `delta` to answer as the fine-tune does on the text of `data`; writes the result to `out`.

    What is made small is KL(fine-tune ‖ expert) + 0.2 √KL · NLL of the text, by the logits (`blocks`: of the head).
    `method` is `whole` (memory: both models in float32 and more, 13 bytes a weight), `blocks` (one block of both, and
    hidden states), or `auto`: `whole` where that fits in half of the memory that is free. A step is `batch` windows
    of `window` tokens (forms of `data`: `huggingface.text.read_texts`); `blocks` takes `steps` of them in every block.
    `rate` is Adam's, on the logarithm of each scale; none means what suits the codes, 0.02 where errors were
    compensated and 0.05 where not, or what suits the first step (`descent.descend`), whichever is less. The first
    eighth of a window is context only. `heldout_share` of the windows, at most about 2,048 tokens, is for
    measuring alone.
    The same arguments give the same scales. `out` may be `delta` itself. `whole` leaves sites alone whose parameter
    transformers fuses with others when it loads them (MoE experts).

    `blocks` writes down every block that it finished; interrupted, and started again alike, it goes on from there.

    Raises `DataError` for too little text or a token without a row, `BaseMismatchError`, `FormatError` (a fine-tune
    of another shape, `out` taken by something else), `NonFiniteError`; `UnsupportedModelError` for a model that
    `blocks` cannot run a block at a time (fused MoE experts).
    """
    if method not in METHODS:
        raise ValueError(f"expected a method of {', '.join(METHODS)}, found {method!r}")
    if steps < 1 or window < 2 or batch < 1 or (rate is not None and not rate > 0) or not 0 < heldout_share < 1:
        raise ValueError(
            "expected at least 1 step, a window of 2, a batch of 1, a rate above 0 and a held-out share between 0 and "
            f"1, found {steps}, {window}, {batch}, {rate}, {heldout_share}"
        )
    start, tuned, checkpoint = time.perf_counter(), Checkpoint.open(finetune), Checkpoint.open(base)
    refuse_overwriting(Path(out))
    windows = Windows.draw(data, tuned.path, window, steps * batch, seed, heldout_share)
    with closing(Delta.open(delta)) as source:
        source.check_base(checkpoint)
        recipe = Recipe(steps, batch, rate or _fastest(source), finds=rate is None, seed=seed)
        windows.check(_vocabulary(tuned, source), data)
        chosen = _fitting(source) if method == "auto" else method
        journal = None
        if chosen == "blocks":
            journal = Journal(Path(out), _about(checkpoint, tuned, source, Path(data), recipe, window, heldout_share))
        run = (
            Whole(checkpoint, tuned, source, windows, recipe)
            if journal is None
            else Blocks(checkpoint, tuned, source, windows, recipe, journal)
        )
        before, after, taken = run.train(progress)
        tokens = taken * min(batch, len(windows.train)) * window
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


def _fastest(delta: Delta) -> float:
    """The rate that suits the delta's codes: errors that make up for each other bear less."""
    settings = delta.manifest["settings"]
    return 0.02 if isinstance(settings, dict) and settings.get("compensated") else 0.05


def _about(
    base: Checkpoint, finetune: Checkpoint, delta: Delta, data: Path, recipe: Recipe, window: int, share: float
) -> dict[str, Any]:
    """Everything that decides the outcome of `blocks`."""
    return {
        "scheme": 4,
        "base": base.sample(),
        "finetune": finetune.sample(),
        "delta": delta.manifest,
        "data": sha256(data.read_bytes()).hexdigest(),
        "recipe": asdict(recipe),
        "window": window,
        "share": share,
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
