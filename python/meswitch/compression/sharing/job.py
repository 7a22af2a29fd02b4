"""`share`: from several fine-tunes of one MoE model to a base and delta directories within a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from meswitch.compression.calibration import Calibration
from meswitch.compression.sharing.deltas import BASE_BITS, WHOLE, DeltasPlan
from meswitch.compression.sharing.family import ModelFamily, Use
from meswitch.compression.sharing.owners import share_by_owners
from meswitch.expert_name import check_name
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.progress import ProgressCallback

SharingPlan: TypeAlias = Literal["deltas", "owners", "medoids"]
PLANS: tuple[SharingPlan, ...] = get_args(SharingPlan)


@dataclass(frozen=True)
class SharingReport:
    """What `share` wrote.

    `base`: the folder that the engine loads. `experts`: the delta directory of each model. `bytes`: of base and deltas.
    `base_bits`: at which plan `deltas` keeps the base, 16 as its files have it; `None` for a base that was quantized
    already, and for other plans. `shared`, `identical`: numbers of MoE experts that all models share, and that were the
    same in all of them.
    """

    plan: SharingPlan
    base: Path
    experts: dict[str, Path]
    bytes: int
    base_bits: int | None
    moe_experts: int
    shared: int
    identical: int

    def to_json(self) -> dict[str, Any]:
        """The fields by their names."""
        experts = {name: str(folder) for name, folder in self.experts.items()}
        return asdict(self) | {"base": str(self.base), "experts": experts}


def share(
    models: Mapping[str, str | Path],
    out: str | Path,
    budget: int,
    *,
    plan: SharingPlan = "deltas",
    base: str | Path | None = None,
    base_bits: int | None = None,
    calibrations: Mapping[str, Calibration] | None = None,
    sensitivities: Mapping[str, dict[str, Tensor]] | None = None,
    uses: Mapping[str, Use] | None = None,
    progress: ProgressCallback | None = None,
) -> SharingReport:
    """Writes a base and a delta directory for each of several fine-tunes of one MoE model, within a budget.

    `models`: folders or hub ids by the name of each expert; two or more. `out`: the folder to write: `experts/NAME`
    and, where it is put together or packed, `base`. `budget`: bytes of base and deltas, without tokenizers and other
    small files. `plan`: what all of them share, see docs/moe.md; the rest is for plan `deltas`, but `calibrations` and
    `progress`.

    `base`: what deltas are added to, which may be a quantized model; without, the model that is least distant from the
    others where it is kept whole, and the mean of all models where it is packed. `base_bits`: at how many bits the base
    is kept; `None` tries all of `BASE_BITS` that fit and takes those with which the deltas lose least: by sensitivity,
    or without by the relative error of the models' weights. A base that is quantized stays as it is. `calibrations`
    (`calibrate`) and `sensitivities` (`measure_sensitivity`): of the models, for their deltas. `uses`: how often each
    model chooses its MoE experts, as weights of plans `deltas` and `medoids`; without, all count alike. `progress`
    counts weights of each model. On disk the packed bases that are tried, and the mean, lie in `out` meanwhile.

    Raises `UnsupportedModelError` for models without MoE experts, `ArchitectureError` for models that differ in shape,
    `BudgetError` for a budget that the smallest of the plan does not meet, with the least that it does; `ValueError`
    for fewer than two models, an unknown plan or width, or options of another plan; what `compress` raises.

    >>> share({"math": "math/"}, "shared/", 1 << 30)
    Traceback (most recent call last):
    ValueError: expected two models or more, found 1
    """
    if plan not in PLANS:
        raise ValueError(f"expected a plan of {', '.join(PLANS)}, found {plan!r}")
    if len(models) < 2:
        raise ValueError(f"expected two models or more, found {len(models)}")
    for name in models:
        check_name(name)
    if plan != "deltas" and (base is not None or base_bits is not None):
        raise ValueError(f"expected no base for plan {plan}, found {base or f'base bits {base_bits}'}")
    given = None if base is None else Checkpoint.open(base)
    widths = _widths(given, base_bits)
    family, known = ModelFamily.open(models, uses or {}), calibrations or {}
    bits: int | None = None
    with _left_as_it_was(Path(out)):
        if plan == "deltas":
            deltas = DeltasPlan(family, given, known, sensitivities or {}, progress)
            folder, used, bits = deltas.write(Path(out), budget, widths)
            bits, shared = (None if given is not None and given.is_quantized else bits), 0
        else:
            folder, used, shared = share_by_owners(family, Path(out), budget, plan, known, progress)
    experts = {name: Path(out) / "experts" / name for name in models}
    moe_experts, identical = len(family.members), family.identical
    return SharingReport(plan, folder, experts, used, bits, moe_experts, shared, identical)


@contextmanager
def _left_as_it_was(out: Path) -> Iterator[None]:
    """Takes an empty folder away again that was made inside, where what is inside fails."""
    existed = out.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with suppress(OSError):  # there is something in it, with which another call goes on
                out.rmdir()
        raise


def _widths(given: Checkpoint | None, base_bits: int | None) -> tuple[int, ...]:
    """The bits at which the base may be kept; of one that is quantized, those of a base that stays as it is."""
    if base_bits is not None and base_bits not in BASE_BITS:
        raise ValueError(f"expected base bits of {', '.join(map(str, BASE_BITS))}, found {base_bits}")
    if given is not None and given.is_quantized:
        if base_bits is not None:
            raise ValueError(f"expected no base bits for a base that is quantized, found {base_bits}: {given.path}")
        return (WHOLE,)
    return BASE_BITS if base_bits is None else (base_bits,)
