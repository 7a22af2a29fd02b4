"""`distill`: from a delta directory to one with trained scales. The package's own page says how they are trained."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil

from meswitch.compression.distillation.blockwise import BlockwiseDistillation
from meswitch.compression.distillation.expert_weight import relative_error
from meswitch.compression.distillation.journal import Journal
from meswitch.compression.distillation.optimizer import Schedule
from meswitch.compression.distillation.options import DistillOptions, Method
from meswitch.compression.distillation.scales import TrainableScales
from meswitch.compression.distillation.whole_model import WholeModelDistillation
from meswitch.compression.distillation.windows import Windows
from meswitch.delta.directory import MANIFEST, Delta
from meswitch.errors import FormatError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import skeleton
from meswitch.huggingface.pairing import pair
from meswitch.progress import ProgressCallback
from meswitch.target import TargetLock, lock_target, resolve_target

_BYTES_PER_WEIGHT = 13  # of method `whole`: both models in float32, the expert's rebuilt weights, a byte a code


@dataclass(frozen=True)
class DistillReport:
    """What a distillation did.

    `method`: `whole` or `blocks`. `steps`, `tokens`: how much it trained on. `kl_before`, `kl_after`:
    KL(fine-tune ‖ expert) in nats a held-out token.
    """

    method: str
    steps: int
    tokens: int
    kl_before: float
    kl_after: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields by their names.

        >>> DistillReport("whole", 1, 1024, 0.5, 0.25, 2.0).to_json()["kl_after"]
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
) -> DistillReport:
    """Trains the scales of `delta` to predict as the fine-tune does on the text of `data`, and writes them to `out`.

    `base` and `finetune` are folders or hub ids, `data` a `.txt` or `.jsonl` file (see `huggingface.documents`).
    The loss is KL(fine-tune ‖ expert) + 0.2 √KL · NLL of the text, in nats a token, on logits (method `blocks`: on the
    head's alone; blocks match hidden states). The best scales on held-out windows are kept, never worse ones than
    before. Equal arguments give equal scales. `out` may be `delta` itself.

    `blocks` writes down every block that it finished, in `.NAME.distilling` beside `out`; after an interruption the
    same call goes on from there. One process at a time writes to `out`, from the first step on.

    Raises `DataError` for too little text or a token that the models have no row for, `BaseMismatchError`,
    `FormatError` (a fine-tune with another vocabulary), `OutputError` (something else at `out`, or another process that
    writes there), `NonFiniteError` for predictions that are not finite, and `UnsupportedModelError` for a model that
    `blocks` cannot run a block at a time.

    >>> options = DistillOptions(steps=2, window=16, batch=2)
    >>> report = distill("base/", "math/", "experts/math", "experts/tuned", "prompts.jsonl", options)
    >>> report.method, report.steps, report.kl_after <= report.kl_before
    ('whole', 2, True)
    """
    start, target = time.perf_counter(), resolve_target(out, replaces=MANIFEST)
    paired = pair(Checkpoint.open(base), Checkpoint.open(finetune))
    windows = Windows.from_text(data, paired.finetune.path, options)
    with closing(Delta.open(delta)) as source:
        source.check_base(paired.base)
        job = _Job(paired.base, paired.finetune, source, windows, options)
        windows.check(job.vocabulary(), data)
        with lock_target(target, MANIFEST) as lock:
            return job.run(lock, Path(data), progress, start)


@dataclass(frozen=True)
class _Job:
    """One distillation, all of its inputs opened."""

    base: Checkpoint
    finetune: Checkpoint
    delta: Delta
    windows: Windows
    options: DistillOptions

    def vocabulary(self) -> int:
        """Rows of the fine-tune's embedding. Raises `FormatError` if the delta's fine-tune has another number."""
        models: list[Any] = [skeleton(folder) for folder in (self.finetune.path, self.delta.path)]
        expected, found = (int(model.get_input_embeddings().num_embeddings) for model in models)
        if expected != found:
            raise FormatError(
                f"expected the fine-tune's vocabulary of {expected}, found {found} in the delta",
                hint="distil against the fine-tune that was compressed",
            )
        return expected

    def run(self, lock: TargetLock, data: Path, progress: ProgressCallback | None, start: float) -> DistillReport:
        """Trains the scales and writes the delta. `start`: when the job began, by `time.perf_counter`."""
        method, schedule = self._method(), self._schedule()
        journal = Journal(lock.path, self._journal_inputs(data)) if method == "blocks" else None
        training = (
            WholeModelDistillation(self.base, self.finetune, self.delta, self.windows, schedule)
            if journal is None
            else BlockwiseDistillation(self.base, self.finetune, self.delta, self.windows, schedule, journal)
        )
        outcome = training.train(progress)
        improved = outcome.after < outcome.before
        report = DistillReport(
            method,
            outcome.steps,
            tokens=outcome.steps * min(self.options.batch, len(self.windows.train)) * self.options.window,
            kl_before=outcome.before,
            kl_after=outcome.after if improved else outcome.before,
            seconds=time.perf_counter() - start,
        )
        self._write(lock, list(training.scales.values()) if improved else [], report)
        if journal is not None:
            journal.delete()
        return report

    def _method(self) -> Method:
        """The method asked for; `auto` is `whole` if that fits in half of the free memory."""
        if self.options.method != "auto":
            return self.options.method
        fits = _BYTES_PER_WEIGHT * self.delta.parameters <= psutil.virtual_memory().available / 2
        return "whole" if fits else "blocks"

    def _schedule(self) -> Schedule:
        """With the given rate, or one that suits the delta: compensated codes depend on each other and bear less."""
        options, settings = self.options, self.delta.manifest["settings"]
        compensated = isinstance(settings, dict) and settings.get("compensated")
        max_rate = options.rate or (0.02 if compensated else 0.05)
        return Schedule(options.steps, options.batch, max_rate, adapt_rate=options.rate is None, seed=options.seed)

    def _journal_inputs(self, data: Path) -> dict[str, Any]:
        """Everything that decides the outcome of method `blocks`; `scheme` numbers the method's own versions."""
        return {
            "scheme": 5,
            "base": self.base.sample(),
            "finetune": self.finetune.sample(),
            "delta": self.delta.manifest,
            "data": sha256(data.read_bytes()).hexdigest(),
            "options": asdict(replace(self.options, method="blocks")),
        }

    def _write(self, lock: TargetLock, scales: list[TrainableScales], report: DistillReport) -> None:
        """Writes the delta with its trained scales, and the relative errors that its sites have now."""
        trained = [site_scales for site_scales in scales if site_scales.has_codes]
        tensors = {name: value for site_scales in trained for name, value in site_scales.tensors().items()}
        errors = {
            site_scales.site.name: relative_error(site_scales, self.base, self.finetune) for site_scales in trained
        }
        summary = {key: value for key, value in report.to_json().items() if key != "seconds"}
        settings = self.delta.manifest["settings"]
        settings = {**(settings if isinstance(settings, dict) else {}), "distilled": summary}
        self.delta.rewrite(lock, tensors, errors, settings)
