"""`compress`: from a base and a fine-tune to a delta directory.

    plans (preset, owners) ─┬──────────────────────────────────────┬── native compress ── delta directory
    method auto: allocation ┘   E[x²] and H of calibration ── codec ┘

What each site gets is decided here; quantizing, hashing, writing and resuming are native.
"""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from meswitch import _native
from meswitch.compression.allocation import Allocation, allocate
from meswitch.compression.calibration import Calibration, frequencies
from meswitch.compression.forms import ErrorCosts
from meswitch.compression.hessians import Hessians
from meswitch.compression.options import CompressOptions
from meswitch.compression.owners import moe_expert_number
from meswitch.compression.plan import Plan, make_plans
from meswitch.compression.presets import PRESETS
from meswitch.delta.directory import MANIFEST, Delta
from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.config import config_changes, finite, json_text, text_config
from meswitch.huggingface.files import carried_files, has_adapter
from meswitch.huggingface.pairing import pair
from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.target import resolve_target

Kind: TypeAlias = Literal["delta", "base"]
"""What a directory holds."""

ChangePlan: TypeAlias = Callable[[Plan], Plan]
"""Returns a plan that takes another's place."""


@dataclass(frozen=True)
class CompressReport:
    """What a compress wrote, and what it took.

    `bytes`: of manifest and tensors. `bpw`: bits a weight, everything included. `weights_per_second`: without what an
    earlier, interrupted run had done. `peak_rss_bytes`: of the process. `config_changes`: fields of config.json that
    make the fine-tune compute differently, with the base's and the fine-tune's value; the engine refuses an expert that
    has any, `restore` keeps them. `compensated`: whether errors were compensated. `chosen`: the forms that method
    `auto` chose, `{role, form, sites, bytes_share, loss_share}` for each role and form; `None` for other methods.
    `notes`: what else is worth a word, a sentence each.
    `predicted_kl`: its estimate of KL(fine-tune ‖ expert) in nats a token, where sensitivity was given.
    """

    preset: str
    method: str
    bytes: int
    bpw: float
    seconds: float
    weights_per_second: float
    peak_rss_bytes: int
    config_changes: dict[str, tuple[Any, Any]]
    compensated: bool = False
    chosen: list[dict[str, Any]] | None = None
    predicted_kl: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields by their names, without `config_changes` and `notes` if there are none."""
        fields = finite(asdict(self))
        return {name: value for name, value in fields.items() if value or name not in ("config_changes", "notes")}


def compress(
    base: str | Path,
    finetune: str | Path,
    out: str | Path,
    options: CompressOptions | str = "default",
    *,
    calibration: Calibration | None = None,
    sensitivity: dict[str, Tensor] | None = None,
    progress: ProgressCallback | None = None,
) -> CompressReport:
    """Writes the delta directory of a fine-tune against its base.

    `base` and `finetune` are folders or hub ids, `options` a preset's name or a `CompressOptions`. `calibration`
    (`calibrate`) weighs errors by the model's inputs, `sensitivity` (`measure_sensitivity`) by their cost in nats,
    which only method `auto` reads. With calibration errors are compensated, if the options allow it and the model can
    be run a block at a time; memory then holds a block, the rows that its MoE experts read, and E[x xᵀ] of the widest
    input two or three times in float64. Otherwise it holds the codes of one site. `progress` counts weights.

    An interrupted run leaves nothing at `out`, but its finished sites in `.NAME.incomplete` beside it, and the same
    call goes on from there. A finished run replaces a delta directory at `out`.

    Raises `CheckpointError`, `ArchitectureError`, `NonFiniteError`; `UnsupportedModelError` for weights that are
    quantized already; `BudgetError` for a target that cannot be met; `OutputError` if something else is at `out`;
    `OSError` for unwritable files; `ValueError` for an unknown preset.

    >>> from meswitch import calibrate
    >>> report = compress("base/", "math/", "experts/math", calibration=calibrate("math/", "prompts.jsonl"))
    >>> report.preset, report.compensated
    ('default', True)
    """
    options = CompressOptions(options) if isinstance(options, str) else options
    target = resolve_target(out, replaces=MANIFEST)
    checkpoints = Checkpoint.open(base), Checkpoint.open(finetune)
    report = _run("delta", *checkpoints, target, options, calibration, sensitivity, progress)
    return replace(report, notes=tuple(_notes(*checkpoints, Delta.open(target), report.config_changes)))


def quantize(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    calibration: Calibration | None = None,
    sensitivity: dict[str, Tensor] | None = None,
    progress: ProgressCallback | None = None,
) -> CompressReport:
    """Writes a whole model in a few bits a weight: a directory as `compress` makes it, against a model of zeros.

    It is a base like any other for `compress`, `Engine` and all that takes one: deltas that are made against it repair
    what was lost. `restore` turns it back and `evaluate_quantized` scores it. `model` is a folder or hub id. `options`:
    without, 4 bits for every matrix. The rest is as in `compress`, and so are what is raised, interruptions, and
    memory.

    >>> quantize("base/", "base-4bit").bpw < quantize("base/", "base-8bit", CompressOptions(bits=8)).bpw
    True
    """
    target, source = resolve_target(out, replaces=MANIFEST), Checkpoint.open(model)
    options = CompressOptions(bits=4) if options is None else options
    return _run("base", source.zeros(), source, target, options, calibration, sensitivity, progress)


def choose_forms(
    base: Checkpoint,
    finetune: Checkpoint,
    options: CompressOptions,
    calibration: Calibration | None = None,
    sensitivity: dict[str, Tensor] | None = None,
    progress: ProgressCallback | None = None,
) -> Allocation:
    """What `compress` would choose with these arguments, of which the options have a target: nothing is written."""
    with tempfile.TemporaryDirectory() as scratch:
        job = _Job("delta", base, finetune, options, calibration, Path(scratch), None)
        return job.choose(sensitivity or {}, progress)


def compress_otherwise(
    base: Checkpoint,
    finetune: Checkpoint,
    target: Path,
    options: CompressOptions,
    change: ChangePlan,
    calibration: Calibration | None = None,
    progress: ProgressCallback | None = None,
) -> CompressReport:
    """`compress` of opened checkpoints, with other plans than the preset's for some parameters."""
    return _run("delta", base, finetune, target, options, calibration, None, progress, change)


def _run(
    kind: Kind,
    base: Checkpoint,
    finetune: Checkpoint,
    target: Path,
    options: CompressOptions,
    calibration: Calibration | None,
    sensitivity: dict[str, Tensor] | None,
    progress: ProgressCallback | None,
    change: ChangePlan | None = None,
) -> CompressReport:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        job = _Job(kind, base, finetune, options, calibration, Path(scratch), change)
        resumed, allocation = job.run(target, sensitivity or {}, progress)
    seconds, delta = time.perf_counter() - start, Delta.open(target)
    return CompressReport(
        preset=options.label,
        method="auto" if options.chooses_per_site else "preset",
        bytes=delta.nbytes,
        bpw=delta.bpw,
        seconds=seconds,
        weights_per_second=(delta.parameters - resumed) / seconds,
        peak_rss_bytes=_peak_rss_bytes(),
        config_changes=job.settings["config_changes"],
        compensated=job.settings["compensated"],
        chosen=allocation.summary() if allocation else None,
        predicted_kl=allocation.loss if allocation and sensitivity else None,
    )


def _notes(base: Checkpoint, finetune: Checkpoint, delta: Delta, config_changes: dict[str, Any]) -> Iterator[str]:
    for checkpoint in (base, finetune):
        if has_adapter(checkpoint.path):
            yield f"the adapter files in {checkpoint.path} are left out: its own weights count"
    if not config_changes and all(site.kind == "shared" for site in delta.sites.values()):
        yield "the fine-tune is the base: no weight differs"


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _config_changes(base: Checkpoint, finetune: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """The fields of config.json that change what the fine-tune computes, with both values."""
    try:
        base_config, finetune_config = (text_config(checkpoint.path).to_dict() for checkpoint in (base, finetune))
    except (OSError, ValueError, KeyError):  # transformers does not know this model: the files are compared
        base_config, finetune_config = base.config, finetune.config
    return config_changes(base_config, finetune_config)


class _Job:
    """One compress, or one `quantize` against zeros: the arguments of the native half, and what comes before it.

    `settings` go into the manifest. `scratch`: a folder for files that are written before they are carried.
    """

    def __init__(
        self,
        kind: Kind,
        base: Checkpoint,
        finetune: Checkpoint,
        options: CompressOptions,
        calibration: Calibration | None,
        scratch: Path,
        change: ChangePlan | None,
    ) -> None:
        if finetune.is_quantized:
            given = "fine-tune" if kind == "delta" else "model"
            raise UnsupportedModelError(
                f"expected 16- or 32-bit weights in the {given}, found a quantized model: {finetune.path}",
                hint=f"give the {given} that it was quantized from; only a base may be quantized",
            )
        self._kind = kind
        paired = pair(base, finetune)
        self._base, self._finetune, self._options = paired.base, paired.finetune, options
        self._change = change or (lambda plan: plan)
        self._pair = paired.base.native, paired.finetune.native
        self._own_names = paired.own_names
        self._calibration = None if calibration is None else self._renamed(calibration)
        self._parameters = sum(prod(self._finetune.shape(name)) for name in self._finetune.names())
        files = carried_files(finetune.path, scratch)
        self._files = [files[name] for name in sorted(files)]
        self._name = base.name
        self.settings: dict[str, Any] = {
            "preset": options.label,
            "bits": options.bits,
            "embedding_bits": options.embedding_bits,
            "calibration_tokens": calibration.tokens if calibration else 0,
            "config_changes": _config_changes(base, finetune),
            "compensated": False,
        }

    def run(
        self, out: Path, sensitivity: dict[str, Tensor], progress: ProgressCallback | None
    ) -> tuple[int, Allocation | None]:
        """Writes the delta. Returns the weights that an earlier run had done, and the choice of method `auto`."""
        phase = "quantizing" if self._kind == "base" else "compressing"
        plans = self._plans()
        if not self._options.chooses_per_site:
            meter = ProgressMeter(progress, phase, self._parameters)
            return self._write(out, plans, self._factors(plans), meter, 0), None
        meter = ProgressMeter(progress, phase, 2 * self._parameters)
        allocation, factor = self._allocate(plans, sensitivity, meter)
        return self._write(out, allocation.plans, factor, meter, self._parameters), allocation

    def choose(self, sensitivity: dict[str, Tensor], progress: ProgressCallback | None) -> Allocation:
        """The choice of method `auto` alone."""
        return self._allocate(self._plans(), sensitivity, ProgressMeter(progress, "choosing", self._parameters))[0]

    def _plans(self) -> list[Plan]:
        made = make_plans(self._base, self._finetune, self._options.rules, self._calibration)
        return [self._change(plan) for plan in made]

    def _write(
        self,
        out: Path,
        plans: list[Plan],
        factor: Callable[[str], bytes | None] | None,
        meter: ProgressMeter,
        done_before: int,
    ) -> int:
        """Runs the native compress; `meter` stands at `done_before` when it starts. Returns the weights it resumed."""
        resumed: int | None = None

        def step(site: str, done: int, total: int) -> None:
            nonlocal resumed
            resumed = done if resumed is None else resumed
            meter.update(done_before + done, site, resumed)

        self.settings["compensated"] = factor is not None
        settings, native = json_text(self.settings), [plan.to_native() for plan in plans]
        _native.compress(
            self._kind, *self._pair, out, native, self._moments(plans), self._files, settings, self._name, step, factor
        )
        return resumed or 0

    def _renamed(self, calibration: Calibration) -> Calibration:
        return replace(calibration, second_moments=self._under_base_names(calibration.second_moments))

    def _under_base_names(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What was measured on the fine-tune alone, by the base's names as well."""
        found = values | {name: values[own] for name, own in self._own_names.items() if own in values}
        for name, own in self._own_names.items():
            # One MoE expert in the base, in the fine-tune a part of a stack.
            part = f"{own}.{moe_expert_number(name)}"
            if part in values:
                found[name] = values[part]
        return found

    def _moments(self, plans: list[Plan]) -> dict[str, bytes]:
        """E[x²] of the sites that are quantized, as little-endian float32."""
        if self._calibration is None:
            return {}
        moments = self._calibration.second_moments
        names = (plan.name for plan in plans if plan.rule is not None and plan.name in moments)
        return {name: moments[name].float().contiguous().numpy().tobytes() for name in names}

    def _factors(self, plans: list[Plan]) -> Callable[[str], bytes | None] | None:
        """A function from site to `Hessians.factor`, for sites whose rule compensates; `None` if none can be."""
        compensated = {plan.name for plan in plans if plan.rule is not None and plan.rule.compensate}
        calibration = self._calibration
        if not self._options.compensate or calibration is None or not calibration.windows or not compensated:
            return None
        try:
            hessians = Hessians(self._finetune, calibration.windows)
        except UnsupportedModelError:
            return None
        return lambda site: hessians.factor(site) if site in compensated else None

    def _costs(self, sensitivity: dict[str, Tensor], *, compensated: bool) -> ErrorCosts:
        calibration, sensitivity = self._calibration, self._under_base_names(sensitivity)
        if calibration is None:
            return ErrorCosts(sensitivity=sensitivity)
        token_frequencies = frequencies(calibration.token_counts)
        return ErrorCosts(calibration.second_moments, sensitivity, token_frequencies, compensated)

    def _allocate(
        self, plans: list[Plan], sensitivity: dict[str, Tensor], meter: ProgressMeter
    ) -> tuple[Allocation, Callable[[str], bytes | None] | None]:
        """A form for every matrix within the target, or without one within the bytes of `plans`; and `_factors`."""
        candidates = list(make_plans(self._base, self._finetune, PRESETS["default"], None))
        factor = self._factors(candidates)
        bpw, target, budget = self._options.bpw, self._options.target_bytes, self._options.budget_bytes
        target = math.floor(bpw * self._parameters / 8) if bpw is not None else target
        # Of a budget for the whole directory, the small files take their part.
        carried = 0 if budget is None else sum(Path(file).stat().st_size for file in self._files)
        target = target if budget is None else budget
        self.settings |= {"method": "auto", "target_bytes": target}
        shared = {plan.name for plan in plans if _native.is_shared(*self._pair, plan.name)}

        def weigh(plans: list[Plan], summary: list[dict[str, Any]]) -> int:
            # With the longest number, so that the smallest possible size does not depend on the target.
            settings = json_text({**self.settings, "target_bytes": 10**15, "chosen": summary})
            native = [plan.to_native() for plan in plans]
            estimate = _native.estimate_bytes(*self._pair, native, shared, self._files, settings, self._name)
            return carried + estimate

        if target is None:
            target = self.settings["target_bytes"] = weigh(plans, [])
        allocation = allocate(
            self._base,
            self._finetune,
            candidates,
            shared,
            self._costs(sensitivity, compensated=factor is not None),
            target,
            lambda allocation: weigh(allocation.plans, allocation.summary()),
            lambda site, done, _: meter.update(done, site),
            whole_model=self._kind == "base",
        )
        self.settings["chosen"] = allocation.summary()
        return allocation, factor
