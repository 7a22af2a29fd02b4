"""Plans "owners" and "medoids": a MoE expert of one model stands for that of all, as far as the budget asks for it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from meswitch.compression.calibration import Calibration
from meswitch.compression.job import compress_otherwise
from meswitch.compression.options import CompressOptions
from meswitch.compression.plan import Plan
from meswitch.compression.sharing.family import ModelFamily, MoeExpert, checkpoint_bytes
from meswitch.errors import BudgetError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.progress import ProgressCallback
from meswitch.target import new_folder

OwnersPlan: TypeAlias = Literal["owners", "medoids"]

_SHARING = "sharing.json"  # in a base that was put together: whose each MoE expert is


def share_by_owners(
    family: ModelFamily,
    out: Path,
    budget: int,
    plan: OwnersPlan,
    calibrations: Mapping[str, Calibration],
    progress: ProgressCallback | None,
) -> tuple[Path, int, int]:
    """As many MoE experts of each model's own as the budget allows, the least alike first.

    Returns the base's folder, the bytes of base and deltas, and the number of MoE experts that all models share.
    Raises `BudgetError` for a budget that not even sharing all of them meets.
    """
    owners = _owners(family, plan)

    def write(base: Checkpoint, folder: Path, shared: set[MoeExpert]) -> int:
        total = 0
        kept = {name for place in shared for name in family.members[place]}
        whole = {name for place in owners.keys() - shared for name in family.members[place]}
        for name, model in family.models.items():
            change = partial(_changed, base, kept, whole)
            total += compress_otherwise(
                base, model, folder / name, CompressOptions(), change, calibrations.get(name), progress
            ).bytes
        return total

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".sharing-", dir=out) as scratch:
        base = _write_base(family, owners, Path(scratch) / "base", progress)
        least = checkpoint_bytes(base) + write(base, Path(scratch) / "experts", set(owners))
        if least > budget:
            raise BudgetError(
                f"expected a budget of at least {least:,} bytes, found {budget:,}",
                hint="that is one model and the trunks of the others, with all MoE experts shared",
                least=least,
            )
        with new_folder(out / "base", replaces=_SHARING) as new:
            shutil.copytree(base.path, new, dirs_exist_ok=True)
    base, shared, left = Checkpoint(out / "base"), list(owners), budget - least
    while shared and (more := (len(family.models) - 1) * family.bytes_of(shared[-1])) <= left:
        left -= more
        shared.pop()
    return base.path, checkpoint_bytes(base) + write(base, out / "experts", set(shared)), len(shared)


def _owners(family: ModelFamily, plan: OwnersPlan) -> dict[MoeExpert, int]:
    """The model whose MoE expert would be shared, by number, of every MoE expert: the most alike first."""
    if plan == "medoids":
        nearest = {place: family.nearest([place]) for place in family.members}
        return dict(sorted(nearest.items(), key=lambda item: family.damage(*item)))
    alike = sorted(family.members, key=lambda place: sum(family.distances[place]))
    return {place: number % len(family.models) for number, place in enumerate(alike)}


def _write_base(
    family: ModelFamily, owners: Mapping[MoeExpert, int], folder: Path, progress: ProgressCallback | None
) -> Checkpoint:
    """A checkpoint of the first model's trunk and each owner's MoE experts."""
    models = list(family.models.values())
    owner_of = {name: models[owner] for place, owner in owners.items() for name in family.members[place]}
    with new_folder(folder, replaces=_SHARING) as new:
        written = {f"{layer}.{number}": list(family.models)[owner] for (layer, number), owner in owners.items()}
        (new / _SHARING).write_text(json.dumps({"owners": written}, indent=1))
        family.put_together(new, lambda name: owner_of.get(name, models[0]).tensor(name), progress)
    return Checkpoint(folder)


def _changed(base: Checkpoint, kept: set[str], whole: set[str], plan: Plan) -> Plan:
    """A parameter's plan: of MoE experts that are shared, that of no change; of others, stored whole."""
    if plan.name in kept and plan.rule is not None:
        rows = base.shape(plan.name)[0]
        return replace(plan, rule=replace(plan.rule, compensate=False), row_bits=((0, tuple(range(rows))),))
    return replace(plan, rule=None) if plan.name in whole else plan
