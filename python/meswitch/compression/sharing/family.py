"""The fine-tunes of one MoE model that are to share memory: how far apart they are, and models put together of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from math import prod
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from meswitch.compression.owners import parameter_owners
from meswitch.delta.directory import Delta
from meswitch.errors import ArchitectureError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.files import small_files
from meswitch.huggingface.pairing import pair
from meswitch.huggingface.shards import write_shards
from meswitch.progress import ProgressCallback, ProgressMeter

MoeExpert: TypeAlias = tuple[int, int]
"""Its layer and number."""

Use: TypeAlias = Mapping[MoeExpert, float]
"""The share of a layer's choices that goes to each MoE expert."""

_ENTRY_BYTES = 512  # of a tensor in header and manifest, at most


@dataclass
class ModelFamily:
    """The models, opened, and the distances between their MoE experts.

    `members`: the parameters of each MoE expert. `distances`: ‖A − B‖² of it for each pair of models, in the order of
    `combinations`, in units of the mean ‖A‖² of all.
    """

    models: dict[str, Checkpoint]
    members: dict[MoeExpert, list[str]]
    distances: dict[MoeExpert, list[float]]
    uses: Mapping[str, Use]

    @classmethod
    def open(cls, paths: Mapping[str, str | Path], uses: Mapping[str, Use]) -> ModelFamily:
        """Opens models by their names and compares them.

        Raises `UnsupportedModelError` for quantized ones and for those without MoE experts that are tensors of their
        own, `ArchitectureError` for models that differ in shape; what `Checkpoint.open` raises.
        """
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

    @property
    def most_central(self) -> str:
        """The model whose MoE experts are nearest to those of the others."""
        return list(self.models)[self.nearest(list(self.members))]

    @property
    def identical(self) -> int:
        """How many MoE experts are the same in all models."""
        return sum(not any(distances) for distances in self.distances.values())

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

    def put_together(self, folder: Path, tensor: Callable[[str], Tensor], progress: ProgressCallback | None) -> None:
        """Writes the files of a checkpoint to a folder: the first model's small files, and `tensor(name)` by name."""
        first = next(iter(self.models.values()))
        weights = {name: prod(first.shape(name)) for name in first.names()}
        meter = ProgressMeter(progress, "writing the base", sum(weights.values()))

        def counted(name: str) -> Tensor:
            meter.advance(weights[name], name)
            return tensor(name)

        for name, file in small_files(first.path).items():
            (folder / name).write_bytes(file.read_bytes())
        write_shards(folder, {name: count * first.dtype(name).itemsize for name, count in weights.items()}, counted)

    def mean(self, name: str) -> Tensor:
        """The mean of a parameter over all models, in the first one's dtype; of what is no float, the first one's."""
        first, *others = (model.tensor(name) for model in self.models.values())
        if not first.is_floating_point():
            return first
        return (sum((other.float() for other in others), first.float()) / len(self.models)).to(first.dtype)


def checkpoint_bytes(checkpoint: Checkpoint) -> int:
    """Of its tensors; of a quantized one, with its manifest."""
    if checkpoint.is_quantized:
        return Delta.open(checkpoint.path).nbytes
    return sum(prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize for name in checkpoint.names())


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
