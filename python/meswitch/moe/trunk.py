"""A model without its MoE experts: what is left is loaded by transformers as ever, and they are never made."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import Check, load_model, placeholder, skeleton, without_parameters
from meswitch.moe.extents import Stack, find_stacks, stack_names


def load_trunk(
    base: Checkpoint, dtype: str | torch.dtype = "auto", *, check: Check | None = None
) -> tuple[Any, dict[str, dict[str, Stack]]]:
    """The model of a checkpoint, and the stacks of its MoE experts by module, as `find_stacks` has them.

    In the model each of these is a tensor of NaNs that takes no memory. Arguments and errors as in `load_model`; also
    `UnsupportedModelError` for a model without MoE experts, and for one whose MoE experts are on disk in another dtype
    than the model runs in.
    """
    if base.is_quantized:
        raise UnsupportedModelError(
            f"{base.path}: expected a checkpoint of plain weights to read MoE experts from, found a quantized model",
            hint="leave moe_budget out: all MoE experts of a quantized model stay in memory, packed",
        )
    empty = skeleton(base.path, None if isinstance(dtype, str) else dtype)
    stacks = find_stacks(base, empty)
    if not stacks:
        raise UnsupportedModelError(
            f"{type(empty).__name__}: expected a model with MoE experts, found a dense one: {base.path}",
            hint="leave moe_budget out",
        )
    absent = {name for module in stacks.values() for stack in module.values() for name in stack.names}
    with ExitStack() as changes:
        for kind, names in {type(module): stack_names(module) for module in map(empty.get_submodule, stacks)}.items():
            changes.enter_context(without_parameters([kind], names))
        model = load_model(base, dtype, check=check, absent=absent)
    for name, module in stacks.items():
        for leaf, stack in module.items():
            if stack.dtype != model.dtype:
                raise UnsupportedModelError(
                    f"{name}.{leaf}: expected {model.dtype} on disk, as the model runs, found {stack.dtype}",
                    hint="MoE experts are used as they are read: leave dtype out, or save the checkpoint in that one",
                )
            shape = (len(stack.extents), *stack.shape)
            stands_for_it = nn.Parameter(placeholder(shape, stack.dtype), requires_grad=False)
            setattr(model.get_submodule(name), leaf, stands_for_it)
    return model, stacks
