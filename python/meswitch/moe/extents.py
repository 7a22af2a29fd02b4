"""Where the MoE experts of a checkpoint lie in its files.

    on disk      experts.5.gate_proj.weight, experts.5.up_proj.weight        or   experts.gate_up_proj [8, 2·I, H]
    in a model   experts.gate_up_proj[5], one below another                       experts.gate_up_proj[5], as it lies

transformers' own conversion says which tensors become which parameter, so there is no table of families here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.names import ParameterNames, moe_blocks

Extent = tuple[Path, int, int]
"""A file, the first of some bytes in it, and how many there are."""


@dataclass(frozen=True)
class Stack:
    """A parameter `[MoE experts, ...]` of a module.

    `shape`, `dtype`: of one MoE expert's matrix. `extents`: for each MoE expert, the bytes that make its matrix up.
    `names`: the tensors on disk that become the parameter.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    extents: list[list[Extent]]
    names: list[str]


def stack_names(module: Any) -> tuple[str, str]:
    """The parameters of a module of MoE experts that are stacks of matrices, in the order in which they are used."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def find_stacks(base: Checkpoint, empty: nn.Module) -> dict[str, dict[str, Stack]]:
    """The stacks of every module of MoE experts, by module; `empty`: the model's skeleton.

    Raises `UnsupportedModelError`, naming the module, where a MoE expert is not what some runs of bytes hold one after
    another, or where transformers computes MoE experts in another way than by its common interface.
    """
    names = ParameterNames(empty)
    on_disk: dict[str, dict[str, str]] = {}  # by parameter, the tensors' names by the pieces that they become
    for place, name in names.places(base.native.stored_names()).items():
        on_disk.setdefault(place.parameter, {})[place.piece] = name
    found: dict[str, dict[str, Stack]] = {}
    for block, module in moe_blocks(empty):
        name = f"{block}.experts".removeprefix(".")
        experts = module.get_submodule("experts")
        if not all(hasattr(experts, field) for field in ("has_gate", "is_transposed", "has_bias", "_apply_gate")):
            raise UnsupportedModelError(
                f"{name}: expected MoE experts of transformers' common interface, found {type(experts).__name__}",
                hint="serve the model without moe_budget",
            )
        parameters = dict(experts.named_parameters())
        found[name] = {
            stack: _stack(base, names, f"{name}.{stack}", on_disk, parameters[stack]) for stack in stack_names(experts)
        }
    return found


def _stack(
    base: Checkpoint, names: ParameterNames, parameter: str, on_disk: dict[str, dict[str, str]], weight: Tensor
) -> Stack:
    pieces, count, shape = on_disk.get(parameter, {}), len(weight), tuple(weight.shape[1:])
    order = list(pieces.values())
    if list(pieces) == [""] and base.shape(order[0]) == tuple(weight.shape):
        file, start, nbytes = base.extent(order[0])
        each = nbytes // count
        extents = [[(file, start + number * each, each)] for number in range(count)]
        return Stack(shape, base.dtype(order[0]), extents, order)
    stacked = names.stack(parameter, order) if order and "" not in pieces else None
    if stacked is None or len(stacked) % count:
        raise _scattered(parameter, order)
    each = len(stacked) // count
    of = [stacked[start : start + each] for start in range(0, len(stacked), each)]
    dtypes = {base.dtype(name) for name in stacked}
    shapes = [[base.shape(name) for name in own] for own in of]
    rows = all(sum(rows for rows, _ in own) == shape[0] and {own[1] for own in own} == {shape[1]} for own in shapes)
    if not rows or len(dtypes) != 1:
        raise _scattered(parameter, order)
    return Stack(shape, dtypes.pop(), [[base.extent(name) for name in own] for own in of], stacked)


def _scattered(parameter: str, order: list[str]) -> UnsupportedModelError:
    lies = f"{len(order)} tensors such as {order[0]}" if order else "nothing"
    return UnsupportedModelError(
        f"{parameter}: expected each MoE expert's matrix in runs of bytes, found {lies} in another form",
        hint="serve the model without moe_budget",
    )
