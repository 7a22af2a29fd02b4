"""Several fine-tuned models with MoE experts on one device, by sharing what is alike.

    plan "deltas"     one model whole, the others as deltas against it: nothing of a model is given up
    plan "owners"     a MoE expert of one model stands for that of all, the most alike first; owners take turns
    plan "medoids"    the same, but the owner is the one that is nearest to all others, weighed by use

"owners" is the plan of "QoS-Efficient Serving of Multiple Mixture-of-Expert LLMs Using Partial Runtime Reconfiguration"
(arXiv 2505.06481, section 3.1), for comparison. Every plan is written as a base and delta directories against it, which
any engine serves: in those of the last two, a shared MoE expert is the base's, and any other is stored whole.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from meswitch.compression.calibration import Calibration
from meswitch.compression.job import compress, compress_otherwise
from meswitch.compression.options import CompressOptions
from meswitch.compression.owners import parameter_owners
from meswitch.compression.plan import Plan
from meswitch.delta.directory import Delta
from meswitch.errors import ArchitectureError, BudgetError, UnsupportedModelError
from meswitch.expert_name import check_name
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.files import small_files
from meswitch.huggingface.pairing import pair
from meswitch.huggingface.shards import write_shards
from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.target import new_folder

SharingPlan: TypeAlias = Literal["deltas", "owners", "medoids"]
PLANS: tuple[SharingPlan, ...] = get_args(SharingPlan)

MoeExpert: TypeAlias = tuple[int, int]
"""Its layer and number."""

Use: TypeAlias = Mapping[MoeExpert, float]
"""The share of a layer's choices that goes to each MoE expert."""

_SHARING = "sharing.json"  # in a base that was put together: whose each MoE expert is
_ENTRY_BYTES = 512  # of a tensor in header and manifest, at most


@dataclass(frozen=True)
class SharingReport:
    """What `share` wrote.

    `base`: the folder that the engine loads. `experts`: the delta directory of each model. `bytes`: of base and deltas.
    `shared`, `identical`: numbers of MoE experts that all models share, and that were the same in all of them.
    """

    plan: SharingPlan
    base: Path
    experts: dict[str, Path]
    bytes: int
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
    calibrations: Mapping[str, Calibration] | None = None,
    uses: Mapping[str, Use] | None = None,
    progress: ProgressCallback | None = None,
) -> SharingReport:
    """Writes a base and a delta directory for each of several fine-tunes of one MoE model, within a budget.

    `models`: folders or hub ids by the name of each expert; two or more. `out`: the folder to write: `experts/NAME`
    and, unless one of the models is the base itself (plan `deltas`), `base`. `budget`: bytes of base and deltas.
    `base`: what plan `deltas` adds deltas to, which may be a quantized model; without, the model that is least distant
    from the others. `calibrations`: of the models, for their deltas. `uses`: how often each model chooses its MoE
    experts, as weights of plans `deltas` and `medoids`; without, all count alike. `progress` counts weights of each
    model.

    Raises `UnsupportedModelError` for models without MoE experts, `ArchitectureError` for models that differ in shape,
    `BudgetError` for a budget that not even sharing all MoE experts meets, `ValueError` for fewer than two models, an
    unknown plan, or a base for another plan than `deltas`; what `compress` raises.

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
    if base is not None and plan != "deltas":
        raise ValueError(f"expected no base for plan {plan}, found {base}")
    family = _Family.open(models, uses or {})
    if plan == "deltas":
        given = None if base is None else Checkpoint.open(base)
        return _share_by_deltas(family, Path(out), budget, given, calibrations or {}, progress)
    return _share_by_owners(family, Path(out), budget, plan, calibrations or {}, progress)


@dataclass
class _Family:
    """The models, opened, and the distances between their MoE experts.

    `members`: the parameters of each MoE expert. `distances`: ‖A − B‖² of it for each pair of models, in the order of
    `combinations`, in units of the mean ‖A‖² of all.
    """

    models: dict[str, Checkpoint]
    members: dict[MoeExpert, list[str]]
    distances: dict[MoeExpert, list[float]]
    uses: Mapping[str, Use]

    @classmethod
    def open(cls, paths: Mapping[str, str | Path], uses: Mapping[str, Use]) -> _Family:
        models = {name: Checkpoint.open(path) for name, path in paths.items()}
        for name, model in models.items():
            if model.is_quantized:
                raise UnsupportedModelError(f"expected 16- or 32-bit weights, found the quantized model {name}")
        first, *others = models.values()
        for other in others:
            _check_alike(first, other)
        members: dict[MoeExpert, list[str]] = {}
        for name, owner in parameter_owners(first, first.names()).items():
            if owner.place is not None and owner.place[1] is not None:
                members.setdefault((owner.place[0], owner.place[1]), []).append(name)
        if not members:
            raise UnsupportedModelError(
                f"expected models with MoE experts that are tensors of their own, found none in {first.path}",
                hint="compress dense fine-tunes against their base: meswitch compress",
            )
        distances = {place: _distances(list(models.values()), names) for place, names in members.items()}
        return cls(models, members, distances, uses)

    def distance(self, place: MoeExpert, one: int, other: int) -> float:
        """Of one MoE expert between two models, by their numbers."""
        if one == other:
            return 0.0
        pairs = list(combinations(range(len(self.models)), 2))
        return self.distances[place][pairs.index((min(one, other), max(one, other)))]

    def damage(self, place: MoeExpert, owner: int) -> float:
        """What is lost if one model's MoE expert stands for all others', weighed by their use of it."""
        names = list(self.models)
        return sum(
            self.uses.get(name, {}).get(place, 1.0) * self.distance(place, owner, number)
            for number, name in enumerate(names)
        )

    def nearest(self, places: list[MoeExpert]) -> int:
        """The model whose MoE experts do the least damage in these places."""
        return min(range(len(self.models)), key=lambda owner: sum(self.damage(place, owner) for place in places))

    def bytes_of(self, place: MoeExpert) -> int:
        """Of one model's MoE expert, whole."""
        first = next(iter(self.models.values()))
        return sum(prod(first.shape(name)) * first.dtype(name).itemsize + _ENTRY_BYTES for name in self.members[place])


def _check_alike(one: Checkpoint, other: Checkpoint) -> None:
    """Raises `ArchitectureError` for models whose parameters have other names or shapes."""
    pair(one, other)
    for name in one.names():
        found = other.shape(name) if name in other else None
        if found != one.shape(name):
            raise ArchitectureError(f"expected {name} {one.shape(name)} in {other.path}, found {found}")


def _distances(models: list[Checkpoint], names: list[str]) -> list[float]:
    """‖A − B‖² of each pair of models over some parameters, in units of the mean ‖A‖²."""
    squares, size = [0.0] * len(list(combinations(models, 2))), 0.0
    for name in names:
        tensors = [model.tensor(name).float() for model in models]
        size += sum(float(tensor.square().sum()) for tensor in tensors) / len(models)
        for number, (one, other) in enumerate(combinations(tensors, 2)):
            squares[number] += float((one - other).square().sum())
    return [square / (size or 1.0) for square in squares]


def _share_by_deltas(
    family: _Family,
    out: Path,
    budget: int,
    base: Checkpoint | None,
    calibrations: Mapping[str, Calibration],
    progress: ProgressCallback | None,
) -> SharingReport:
    """A base or one of the models as it is; all others within what is left of the budget."""
    owner = None if base is not None else list(family.models)[family.nearest(list(family.members))]
    base = base or family.models[owner or ""]
    used, others = _bytes(base), [name for name in family.models if name != owner]
    if owner is not None:
        used += compress(base.path, base.path, out / "experts" / owner).bytes
    target = (budget - used) // len(others)
    if target < 1:
        raise BudgetError(
            f"expected a budget above {used:,} bytes, found {budget:,}", hint="the base alone takes those"
        )
    for name in others:
        calibration, folder = calibrations.get(name), out / "experts" / name
        options, finetune = CompressOptions(target_bytes=target), family.models[name].path
        used += compress(base.path, finetune, folder, options, calibration=calibration, progress=progress).bytes
    return _report(family, "deltas", out, base.path, used, shared=0)


def _share_by_owners(
    family: _Family,
    out: Path,
    budget: int,
    plan: SharingPlan,
    calibrations: Mapping[str, Calibration],
    progress: ProgressCallback | None,
) -> SharingReport:
    """As many MoE experts of each model's own as the budget allows, the least alike first."""
    owners = _owners(family, plan)
    base = _write_base(family, owners, out / "base", progress)

    def write(folder: Path, shared: set[MoeExpert]) -> int:
        total = 0
        kept = {name for place in shared for name in family.members[place]}
        whole = {name for place in owners.keys() - shared for name in family.members[place]}
        for name, model in family.models.items():
            change = partial(_changed, base, kept, whole)
            total += compress_otherwise(
                base, model, folder / name, CompressOptions(), change, calibrations.get(name), progress
            ).bytes
        return total

    with tempfile.TemporaryDirectory() as scratch:
        least = _bytes(base) + write(Path(scratch), set(owners))
    if least > budget:
        raise BudgetError(
            f"expected a budget of at least {least:,} bytes, found {budget:,}",
            hint="that is one model and the trunks of the others, with all MoE experts shared",
        )
    shared, left = list(owners), budget - least
    while shared and (more := (len(family.models) - 1) * family.bytes_of(shared[-1])) <= left:
        left -= more
        shared.pop()
    used = _bytes(base) + write(out / "experts", set(shared))
    return _report(family, plan, out, base.path, used, shared=len(shared))


def _owners(family: _Family, plan: SharingPlan) -> dict[MoeExpert, int]:
    """The model whose MoE expert would be shared, by number, of every MoE expert: the most alike first."""
    if plan == "medoids":
        nearest = {place: family.nearest([place]) for place in family.members}
        return dict(sorted(nearest.items(), key=lambda item: family.damage(*item)))
    alike = sorted(family.members, key=lambda place: sum(family.distances[place]))
    return {place: number % len(family.models) for number, place in enumerate(alike)}


def _write_base(
    family: _Family, owners: Mapping[MoeExpert, int], folder: Path, progress: ProgressCallback | None
) -> Checkpoint:
    """A checkpoint of the first model's trunk and each owner's MoE experts."""
    models = list(family.models.values())
    owner_of = {name: models[owner] for place, owner in owners.items() for name in family.members[place]}
    trunk = models[0]
    sizes = {name: prod(trunk.shape(name)) * trunk.dtype(name).itemsize for name in trunk.names()}
    meter = ProgressMeter(progress, "writing the base", sum(prod(trunk.shape(name)) for name in sizes))

    def tensor(name: str) -> Tensor:
        meter.advance(prod(trunk.shape(name)), name)
        return owner_of.get(name, trunk).tensor(name)

    with new_folder(folder, replaces=_SHARING) as new:
        for name, file in small_files(trunk.path).items():
            (new / name).write_bytes(file.read_bytes())
        written = {f"{layer}.{number}": list(family.models)[owner] for (layer, number), owner in owners.items()}
        (new / _SHARING).write_text(json.dumps({"owners": written}, indent=1))
        write_shards(new, sizes, tensor)
    return Checkpoint(folder)


def _changed(base: Checkpoint, kept: set[str], whole: set[str], plan: Plan) -> Plan:
    """A parameter's plan: of MoE experts that are shared, that of no change; of others, stored whole."""
    if plan.name in kept and plan.rule is not None:
        rows = base.shape(plan.name)[0]
        return replace(plan, rule=replace(plan.rule, compensate=False), row_bits=((0, tuple(range(rows))),))
    return replace(plan, rule=None) if plan.name in whole else plan


def _bytes(checkpoint: Checkpoint) -> int:
    if checkpoint.is_quantized:
        return Delta.open(checkpoint.path).nbytes
    return sum(prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize for name in checkpoint.names())


def _report(family: _Family, plan: SharingPlan, out: Path, base: Path, used: int, *, shared: int) -> SharingReport:
    identical = sum(not any(distances) for distances in family.distances.values())
    experts = {name: out / "experts" / name for name in family.models}
    return SharingReport(plan, base, experts, used, len(family.members), shared, identical)
