"""What a mixture-of-experts (MoE) model takes in memory at several bit widths, from the headers of its files alone.

skeleton ── which parameters are MoE experts' ─┐
headers ── names, shapes, dtypes ──────────────┴ bytes of trunk and MoE experts at 1, 2, 3, 4, 8 and 16 bits
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from torch import nn

from meswitch import _native
from meswitch.compression.forms import weigh
from meswitch.compression.plan import make_plans
from meswitch.compression.presets import PRESETS, override_bits
from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import HEAD, Checkpoint
from meswitch.huggingface.files import carried_files
from meswitch.huggingface.models import skeleton
from meswitch.huggingface.names import ParameterNames, moe_blocks
from meswitch.reference import BITS, part_bytes
from meswitch.site import matrix_shape

WHOLE = 16
"""The width of what is stored as it is, in the checkpoint's own 16 or 32 bits."""
WIDTHS = (*BITS, WHOLE)
TRUNK_WIDTHS = (4, WHOLE)


@dataclass(frozen=True)
class UniformSize:
    """A model whose trunk has one bit width and whose MoE experts have one.

    `bytes`: of the model's directory. `bytes_per_token`: what a token reads, which is the trunk and its own MoE
    experts. `fits`: whether the directory is within the budget, `None` without one.
    """

    trunk_bits: int
    moe_expert_bits: int
    bytes: int
    bytes_per_token: int
    fits: bool | None


@dataclass(frozen=True)
class MoePlan:
    """What a MoE model takes.

    `moe_layers`: how many layers have MoE experts. `moe_experts`: in the layer with most. `top_k`: how many of them a
    token uses, `None` if the model does not say. `trunk_bytes`, `moe_expert_bytes`, `layer_bytes` (the MoE experts of
    the largest layer): of the checkpoint as it is. `smallest_bytes`: about the smallest directory, 1 bit in every
    matrix. `possible`: whether `budget` has room for that, `None` without one.
    """

    model: str
    moe_layers: int
    moe_experts: int
    top_k: int | None
    trunk_bytes: int
    moe_expert_bytes: int
    layer_bytes: int
    sizes: tuple[UniformSize, ...]
    smallest_bytes: int
    budget: int | None
    possible: bool | None

    def to_json(self) -> dict[str, Any]:
        """The fields by their names."""
        return asdict(self)


def plan_moe(model: str | Path, budget: int | None = None) -> MoePlan:
    """What a MoE model takes at each bit width, and whether that is within `budget` bytes.

    `model`: a folder or hub id. No weight is read. Sizes are those of the directories that `quantize` makes, with a
    scale for every row and column, within a few percent of a tiny model and closer in a large one.

    Raises `UnsupportedModelError` for a model without MoE experts or with quantized weights, and `CheckpointError`.
    """
    checkpoint = Checkpoint.open(model)
    if checkpoint.is_quantized:
        raise UnsupportedModelError(
            f"expected 16- or 32-bit weights, found a quantized model: {checkpoint.path}",
            hint="give the model that it was quantized from; `meswitch inspect` says what this one takes",
        )
    empty = moe_skeleton(checkpoint)
    trunk, moe_experts = _matrices(checkpoint, empty)
    by_layer: dict[int, int] = {}
    for matrix in moe_experts:
        by_layer[matrix.layer] = by_layer.get(matrix.layer, 0) + matrix.whole
    counts, top_k = _moe_experts(empty), _top_k(empty)
    share = min(1.0, (top_k or max(counts)) / max(counts))
    smallest = _smallest_directory(checkpoint)
    unaccounted = smallest - sum(matrix.stored(1) for matrix in [*trunk, *moe_experts])

    def size(trunk_bits: int, bits: int) -> UniformSize:
        total = unaccounted + sum(m.stored(trunk_bits) for m in trunk) + sum(m.stored(bits) for m in moe_experts)
        read = sum(m.read(trunk_bits) for m in trunk) + share * sum(m.read(bits) for m in moe_experts)
        return UniformSize(trunk_bits, bits, total, round(read), None if budget is None else total <= budget)

    return MoePlan(
        model=checkpoint.name,
        moe_layers=len(by_layer),
        moe_experts=max(counts),
        top_k=top_k,
        trunk_bytes=sum(matrix.whole for matrix in trunk),
        moe_expert_bytes=sum(by_layer.values()),
        layer_bytes=max(by_layer.values()),
        sizes=tuple(size(trunk_bits, bits) for trunk_bits in TRUNK_WIDTHS for bits in WIDTHS),
        smallest_bytes=smallest,
        budget=budget,
        possible=None if budget is None else smallest <= budget,
    )


def _smallest_directory(checkpoint: Checkpoint) -> int:
    """The bytes of the directory with 1 bit in every matrix, small files included."""
    zeros = checkpoint.zeros()
    plans = make_plans(zeros, checkpoint, override_bits(PRESETS["default"], 1, 1), None)
    without_ranks = (plan if plan.rule is None else replace(plan, rule=replace(plan.rule, rank=0)) for plan in plans)
    with tempfile.TemporaryDirectory() as scratch:
        files = [*carried_files(checkpoint.path, Path(scratch)).values()]
        native = [plan.to_native() for plan in without_ranks]
        own = _native.estimate_bytes(zeros.native, checkpoint.native, native, set(), files, "{}", checkpoint.name)
        return own + sum(file.stat().st_size for file in files)


def moe_skeleton(checkpoint: Checkpoint) -> nn.Module:
    """The model on the meta device. Raises `UnsupportedModelError` for one without MoE experts."""
    empty = skeleton(checkpoint.path)
    if not any(True for _ in moe_blocks(empty)):
        raise UnsupportedModelError(
            f"expected a mixture-of-experts model, found a dense {type(empty).__name__}: {checkpoint.path}",
            hint="a dense model: meswitch quantize MODEL -o DIR --target-size SIZE",
        )
    return empty


@dataclass(frozen=True)
class _Parameter:
    """One parameter of the checkpoint. `whole`: its bytes there. `lookup`: whether a token reads one row of it."""

    name: str
    rows: int
    columns: int
    whole: int
    quantized: bool
    lookup: bool
    layer: int

    def tensors(self, bits: int) -> list[tuple[str, int]]:
        """The role and bytes of each of its tensors at a bit width."""
        if bits == WHOLE or not self.quantized:
            return [("whole", self.whole)]
        codes = part_bytes(bits, self.rows, self.columns)
        return [("codes.0", codes), ("scales.0", 2 * self.rows), ("column_scales", 2 * self.columns)]

    def stored(self, bits: int) -> int:
        return weigh(self.name, self.tensors(bits))

    def read(self, bits: int) -> float:
        """What one token reads of it, if it reads it at all."""
        return sum(size for _, size in self.tensors(bits)) / (self.rows if self.lookup else 1)


def _matrices(checkpoint: Checkpoint, empty: nn.Module) -> tuple[list[_Parameter], list[_Parameter]]:
    """The parameters of the trunk, and those of MoE experts."""
    stacks = tuple(f"{name}.experts." for name, _ in moe_blocks(empty))
    owners, tied = ParameterNames(empty).parameters(checkpoint.names()), HEAD not in checkpoint.names()
    trunk: list[_Parameter] = []
    moe_experts: list[_Parameter] = []
    for plan in make_plans(checkpoint, checkpoint, PRESETS["default"], None):
        shape = checkpoint.shape(plan.name)
        rows, columns = matrix_shape(shape, transposed=plan.transposed)
        whole, lookup = prod(shape) * checkpoint.dtype(plan.name).itemsize, plan.role == "embedding" and not tied
        layer = -1 if plan.place is None else plan.place[0]
        found = _Parameter(plan.name, rows, columns, whole, plan.rule is not None, lookup, layer)
        (moe_experts if owners.get(plan.name, "").startswith(stacks) else trunk).append(found)
    return trunk, moe_experts


def _moe_experts(empty: nn.Module) -> list[int]:
    """How many MoE experts each block has: the length of its stacks, or of a list of modules."""
    counts = []
    for _, block in moe_blocks(empty):
        experts = block.get_submodule("experts")
        stacks = [parameter for parameter in experts.parameters(recurse=False) if parameter.dim() > 2]
        counts.append(len(stacks[0]) if stacks else sum(1 for _ in experts.children()))
    return counts


def _top_k(empty: nn.Module) -> int | None:
    """How many MoE experts a token uses, by the gates."""
    found = [getattr(module, "top_k", None) for _, block in moe_blocks(empty) for module in block.modules()]
    return max((value for value in found if isinstance(value, int)), default=None)
