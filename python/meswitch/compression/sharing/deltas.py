"""Plan "deltas": a base in as many bits as the budget allows, and every model as a delta against it.

    widths, the smallest first ── a base of each ── forms of all deltas in the bytes left ── the base that loses least

A delta is made against the base as it is kept, so it repairs what packing the base broke.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from meswitch.compression.calibration import Calibration
from meswitch.compression.job import choose_forms, compress, quantize
from meswitch.compression.options import CompressOptions
from meswitch.compression.sharing.family import ModelFamily, checkpoint_bytes
from meswitch.delta.directory import MANIFEST
from meswitch.errors import BudgetError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.progress import ProgressCallback, relabel
from meswitch.target import new_folder

WHOLE = 16
"""The bits of a base that is kept as its files have it."""

BASE_BITS = (WHOLE, 8, 4, 3, 2)

_NO_LIMIT = 10**15  # bytes


@dataclass(frozen=True)
class _Base:
    """A base that may be chosen. `owner`: the model that it is, if it is one; `bytes` hold its delta of nothing too."""

    bits: int
    checkpoint: Checkpoint
    bytes: int
    owner: str | None = None


@dataclass
class DeltasPlan:
    """The models and what is known of them.

    `given`: what deltas are added to, without one a model or the mean of all. `calibrations`, `sensitivities`: of the
    models, by name. Without sensitivity an error costs its square relative to the weights of its matrix, a weight a
    weight: a unit that, as nats, does not depend on the base.
    """

    family: ModelFamily
    given: Checkpoint | None
    calibrations: Mapping[str, Calibration]
    sensitivities: Mapping[str, dict[str, Tensor]]
    progress: ProgressCallback | None = None

    def write(self, out: Path, budget: int, widths: Sequence[int]) -> tuple[Path, int, int]:
        """Chooses the base's bits among `widths` and writes what the folder `out` lacks: packed base and deltas.

        Returns the base's folder, the bytes of base and deltas, and the base's bits.
        Raises `BudgetError` for a budget below what the smallest base and deltas take.
        """
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".bases-", dir=out) as scratch:
            base = self._choose(self._bases(Path(scratch), widths), budget)
            used, folder = checkpoint_bytes(base.checkpoint), base.checkpoint.path
            if Path(scratch) in folder.parents:
                with new_folder(out / "base", replaces=MANIFEST) as new:
                    shutil.copytree(folder, new, dirs_exist_ok=True)
                folder = out / "base"
        others = [name for name in self.family.models if name != base.owner]
        if base.owner is not None:
            used += compress(folder, folder, out / "experts" / base.owner).bytes
        for number, name in enumerate(others):
            target = (budget - used) // (len(others) - number)
            used += compress(
                folder,
                self.family.models[name].path,
                out / "experts" / name,
                CompressOptions(target_bytes=target),
                calibration=self.calibrations.get(name),
                sensitivity=self._costs[name],
                progress=relabel(self.progress, f"compressing {name}"),
            ).bytes
        return folder, used, base.bits

    def _bases(self, scratch: Path, widths: Sequence[int]) -> Iterator[_Base]:
        """Bases of these widths, the smallest first; packed ones are written to folders in `scratch`."""
        source = self.given
        for bits in sorted(widths):
            if bits == WHOLE:
                yield self._whole_base()
                continue
            if source is None:
                (scratch / "mean").mkdir()
                self.family.put_together(scratch / "mean", self.family.mean, self.progress)
                source = Checkpoint(scratch / "mean")
            show = relabel(self.progress, f"packing the base in {bits} bits")
            folder = scratch / str(bits) / "base"  # called as it will be, since deltas name their base
            quantize(source.path, folder, CompressOptions(bits=bits), progress=show)
            yield _Base(bits, Checkpoint(folder), checkpoint_bytes(Checkpoint(folder)))

    def _whole_base(self) -> _Base:
        if self.given is not None:
            return _Base(WHOLE, self.given, checkpoint_bytes(self.given))
        owner = self.family.most_central
        model = self.family.models[owner]
        nothing = choose_forms(model, model, CompressOptions(target_bytes=_NO_LIMIT)).bytes
        return _Base(WHOLE, model, checkpoint_bytes(model) + nothing, owner)

    def _choose(self, bases: Iterator[_Base], budget: int) -> _Base:
        """The base with which the deltas lose least, by each model's loss in units of its largest."""
        found: list[tuple[_Base, dict[str, float]]] = []
        for base in bases:
            try:
                found.append((base, self._losses(base, budget)))
            except BudgetError:
                if not found:
                    raise
                break  # those with more bits are larger still
        largest = {name: max(losses[name] for _, losses in found) or 1.0 for name in self.family.models}

        def loss(one: tuple[_Base, dict[str, float]]) -> float:
            return sum(loss / largest[name] for name, loss in one[1].items())

        return min(reversed(found), key=loss)[0]  # of equal ones that with the most bits

    def _losses(self, base: _Base, budget: int) -> dict[str, float]:
        """What each model's delta would lose if all got the same share of what the base leaves."""
        others = [name for name in self.family.models if name != base.owner]
        target, losses, least = (budget - base.bytes) // len(others), dict.fromkeys(self.family.models, 0.0), 0
        for name in others:
            show = relabel(self.progress, f"deltas of {name} over {base.bits} bits")
            try:
                losses[name] = choose_forms(
                    base.checkpoint,
                    self.family.models[name],
                    CompressOptions(target_bytes=max(target, 1)),
                    self.calibrations.get(name),
                    self._costs[name],
                    show,
                ).loss
            except BudgetError as error:
                least = max(least, error.least or 0)
        if least:
            needed = base.bytes + len(others) * least
            raise BudgetError(
                f"expected a budget of at least {needed:,} bytes, found {budget:,}",
                hint=f"that is a base of {base.bits} bits and every delta at its smallest",
                least=needed,
            )
        return losses

    @cached_property
    def _costs(self) -> dict[str, dict[str, Tensor]]:
        """What errors in each row cost, by model and parameter."""
        return {
            name: self.sensitivities.get(name) or _relative_costs(model, self.calibrations.get(name))
            for name, model in self.family.models.items()
        }


def _relative_costs(model: Checkpoint, calibration: Calibration | None) -> dict[str, Tensor]:
    """Sensitivities by which an error costs its square relative to all weights of its matrix, times their number."""
    moments = {} if calibration is None else calibration.second_moments
    costs = {}
    for name in model.names():
        weight = model.tensor(name)
        if weight.dim() == 2 and weight.is_floating_point():
            unit = float(moments[name].double().mean()) if name in moments else 1.0  # codec and forms divide by it
            mean_square = float(weight.float().square().mean())
            costs[name] = torch.full((len(weight),), 1 / (max(mean_square, 1e-30) * max(unit, 1e-30)))
    return costs
