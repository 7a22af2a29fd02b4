"""Compressing: base and fine-tune to a delta directory.

    plans (preset, owners) ─┬──────────────────────────────────────┬── native compress ── delta directory
    method auto: allocation ┘   E[x²] and H of calibration ── codec ┘

What each site gets is decided here; quantizing, hashing, writing and resuming are native.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from meswitch import _native
from meswitch.compression.allocation import Allocation, allocate
from meswitch.compression.calibration import Calibration, frequencies
from meswitch.compression.forms import Costs
from meswitch.compression.hessians import Hessians
from meswitch.compression.options import CompressOptions
from meswitch.compression.plan import Plan, make_plans
from meswitch.compression.presets import PRESETS
from meswitch.delta.directory import Delta
from meswitch.delta.target import refuse_overwriting
from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.config import config_changes, text_config
from meswitch.huggingface.files import small_files
from meswitch.progress import ProgressCallback, ProgressMeter


@dataclass(frozen=True)
class CompressReport:
    """What a compress made: the bytes of manifest and tensors, bits a weight, and what it took.

    `config_changes`: the fields of config.json by which the fine-tune computes differently, with base's and fine-tune's
    value. The engine refuses an expert that has any; `restore` carries them. `compensated`: whether codes make up for
    one another's errors. `chosen` says what method `auto` did, one entry a role and form:
    `{role, form, sites, bytes_share, loss_share}`; `None` otherwise. `predicted_kl` is its guess at
    KL(fine-tune ‖ expert) in nats a token, where sensitivity was given.
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

    def to_json(self) -> dict[str, Any]:
        """The fields as they are, without `config_changes` where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "config_changes" or value}


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
    weighs errors by what the model sees, `sensitivity` (`measure_sensitivity`) sites and rows by what an error there
    costs. With calibration, errors are compensated where the options say so, unless the model cannot be run a block at
    a time (fused MoE experts): memory then holds a block, and E[x xᵀ] of the widest input two or three times in
    float64. `progress` counts weights.

    An interrupted run leaves nothing at `out`, but its finished sites in `.NAME.incomplete` beside it, and the same
    call goes on from there; one that finishes replaces the delta directory that stood there.

    Raises `CheckpointError`, `ArchitectureError` or `NonFiniteError`; `BudgetError` for a target that cannot be met;
    `FormatError` where something else stands at `out`; `OSError` where the disk says no; `ValueError` for an unknown
    preset.
    """
    options = CompressOptions(options) if isinstance(options, str) else options
    start, target = time.perf_counter(), Path(out)
    refuse_overwriting(target)
    job = _Job(Checkpoint.open(base), Checkpoint.open(finetune), options, calibration)
    resumed, found = job.run(target, sensitivity or {}, progress)
    seconds, delta = time.perf_counter() - start, Delta.open(target)
    return CompressReport(
        preset=options.label,
        method="auto" if options.chooses_per_site else "preset",
        bytes=delta.nbytes,
        bpw=delta.bpw,
        seconds=seconds,
        weights_per_second=(delta.parameters - resumed) / seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        config_changes=job.settings["config_changes"],
        compensated=job.settings["compensated"],
        chosen=None if found is None else found.summary(),
        predicted_kl=None if found is None or not sensitivity else found.loss,
    )


def _config_changes(base: Checkpoint, finetune: Checkpoint) -> dict[str, tuple[Any, Any]]:
    try:
        ours, theirs = (text_config(checkpoint.path).to_dict() for checkpoint in (base, finetune))
    except (OSError, ValueError, KeyError):  # a model that transformers does not know: as the files say
        ours, theirs = base.config, finetune.config
    return config_changes(ours, theirs)


class _Job:
    """One compress: what is asked of the native half, and in which order."""

    def __init__(
        self, base: Checkpoint, finetune: Checkpoint, options: CompressOptions, calibration: Calibration | None
    ) -> None:
        self._base, self._finetune, self._options, self._calibration = base, finetune, options, calibration
        self._pair = base.native, finetune.native
        self._parameters = sum(prod(finetune.shape(name)) for name in finetune.names())
        self._files = sorted(small_files(finetune.path).values())
        self._name = str(base.config.get("_name_or_path") or base.path.name)
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
        """Writes the delta. Returns the weights that an earlier run had done, and what method `auto` chose."""
        plans = list(make_plans(self._base, self._finetune, self._options.rules, self._calibration))
        if not self._options.chooses_per_site:
            meter = ProgressMeter(progress, "compressing", self._parameters)
            return self._write(out, plans, self._factors(plans), meter, 0), None
        meter = ProgressMeter(progress, "compressing", 2 * self._parameters)
        every = list(make_plans(self._base, self._finetune, PRESETS["default"], None))
        factor = self._factors(every)
        costs = self._costs(sensitivity, compensated=factor is not None)
        found = self._allocate(plans, every, costs, meter)
        self.settings["chosen"] = found.summary()
        return self._write(out, found.plans, factor, meter, self._parameters), found

    def _write(
        self,
        out: Path,
        plans: list[Plan],
        factor: Callable[[str], bytes | None] | None,
        meter: ProgressMeter,
        before: int,
    ) -> int:
        """The native compress; `before` weights are counted as done when it starts."""
        resumed: int | None = None

        def step(site: str, done: int, total: int) -> None:
            nonlocal resumed
            resumed = done if resumed is None else resumed
            meter.update(before + done, site, resumed)

        self.settings["compensated"] = factor is not None
        settings, native = json.dumps(self.settings), [plan.to_native() for plan in plans]
        _native.compress(
            *self._pair, out, native, self._moments(plans), self._files, settings, self._name, step, factor
        )
        return resumed or 0

    def _moments(self, plans: list[Plan]) -> dict[str, bytes]:
        """E[x²] of the sites that are quantized, as the native half takes it."""
        if self._calibration is None:
            return {}
        seen = self._calibration.second_moments
        wanted = (plan.name for plan in plans if plan.rule is not None)
        return {name: seen[name].float().contiguous().numpy().tobytes() for name in wanted if name in seen}

    def _factors(self, plans: list[Plan]) -> Callable[[str], bytes | None] | None:
        """What compensates the errors of the sites that ask for it, if anything can."""
        wanted = {plan.name for plan in plans if plan.rule is not None and plan.rule.compensate}
        calibration = self._calibration
        if not self._options.compensate or calibration is None or not calibration.windows or not wanted:
            return None
        try:
            hessians = Hessians(self._finetune, calibration.windows)
        except UnsupportedModelError:
            return None
        return lambda site: hessians.factor(site) if site in wanted else None

    def _costs(self, sensitivity: dict[str, Tensor], *, compensated: bool) -> Costs:
        """What errors cost, as far as calibration and `sensitivity` tell."""
        seen = self._calibration
        if seen is None:
            return Costs()
        return Costs(seen.second_moments, sensitivity, frequencies(seen.token_counts), compensated)

    def _allocate(self, plans: list[Plan], every: list[Plan], costs: Costs, meter: ProgressMeter) -> Allocation:
        """A form for `every` matrix within the target, or else within what `plans` would weigh."""
        bpw, target = self._options.bpw, self._options.target_bytes
        target = math.floor(bpw * self._parameters / 8) if bpw is not None else target
        self.settings |= {"method": "auto", "target_bytes": target}
        shared = {plan.name for plan in plans if _native.same(*self._pair, plan.name)}

        def weigh(plans: list[Plan], summary: list[dict[str, Any]]) -> int:
            # The longest number: what is least possible must not depend on what was asked for.
            settings = json.dumps({**self.settings, "target_bytes": 10**15, "chosen": summary})
            native = [plan.to_native() for plan in plans]
            return _native.weigh(*self._pair, native, shared, self._files, settings, self._name)

        if target is None:
            target = self.settings["target_bytes"] = weigh(plans, [])
        return allocate(
            self._base,
            self._finetune,
            every,
            shared,
            costs,
            target,
            lambda found: weigh(found.plans, found.summary()),
            lambda site, done, _: meter.update(done, site),
        )
