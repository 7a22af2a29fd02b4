"""The module that owns each parameter: its role, which decides how it is stored, and its place in the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from torch import nn

from meswitch.errors import CheckpointError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import is_transposed, skeleton
from meswitch.huggingface.names import ParameterNames, moe_gates

# In a checkpoint each MoE expert has parameters of its own, which transformers stacks.
_MOE_EXPERT = re.compile(r"\.experts\.(\d+)\.")

Role: TypeAlias = Literal["block", "embedding", "head", "gate"]
"""What a parameter is for. `gate`: routes between MoE experts. `block`: everything that is none of the others."""

Place: TypeAlias = tuple[int, int | None]
"""Where a parameter is in the model: the number of its layer, and of the MoE expert that it is part of, if any."""


@dataclass(frozen=True)
class Owner:
    """The module that owns a parameter: its role, whether it stores its weight `[in, out]`, and when it runs.

    `order` sorts parameters in the order in which the model runs them. `place`: `None` outside of layers.
    """

    role: Role
    transposed: bool
    order: tuple[int, int]
    place: Place | None = None


def parameter_owners(finetune: Checkpoint, names: Iterable[str]) -> dict[str, Owner]:
    """The owners of parameters, by their names in the checkpoint; empty for a model that transformers does not know.

    Raises `CheckpointError` for a checkpoint without a config.json.
    """
    try:
        model = skeleton(finetune.path)
    except CheckpointError:
        finetune.config  # noqa: B018  raises where there is none
        return {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    gates = {id(gate) for _, gate in moe_gates(model)}
    owners: dict[str, Owner] = {}
    for position, (module_name, module) in enumerate(model.named_modules()):
        role: Role = "gate" if id(module) in gates else "block"
        if module is head or isinstance(module, nn.Embedding):
            role = "head" if module is head else "embedding"
        layer = _layer(model, module_name)
        for number, (leaf, parameter) in enumerate(module.named_parameters(recurse=False)):
            # All parameters of a stack of MoE experts have one place, so that each expert's matrices stay together.
            order = (position, 0 if parameter.dim() > 2 else number)
            transposed = is_transposed(module) and leaf == "weight"
            place = None if layer is None else (layer, None)
            owners[f"{module_name}.{leaf}" if module_name else leaf] = Owner(role, transposed, order, place)
    found = ((name, owners[parameter]) for name, parameter in ParameterNames(model).parameters(names).items())
    return {name: replace(owner, place=_place(owner.place, name)) for name, owner in found}


def _place(place: Place | None, name: str) -> Place | None:
    """A place in the model, with the MoE expert that the parameter's name in the checkpoint says."""
    moe_expert = moe_expert_number(name)
    return place if place is None or moe_expert is None else (place[0], moe_expert)


def moe_expert_number(name: str) -> int | None:
    """The number of the MoE expert that a parameter belongs to by its name in the checkpoint.

    >>> moe_expert_number("model.layers.0.mlp.experts.12.up_proj.weight"), moe_expert_number("lm_head.weight")
    (12, None)
    """
    found = _MOE_EXPERT.search(name)
    return None if found is None else int(found[1])


def _layer(model: nn.Module, module_name: str) -> int | None:
    """The number of a module, or of one that it lies in, in the outermost list of modules around it."""
    parts = module_name.split(".")
    for number, part in enumerate(parts):
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:number])), nn.ModuleList):
            return int(part)
    return None
