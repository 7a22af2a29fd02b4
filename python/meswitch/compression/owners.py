"""What the model says of its parameters: which module owns each, and so how it is stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn
from transformers.pytorch_utils import Conv1D

from meswitch.errors import CheckpointError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import skeleton
from meswitch.huggingface.names import ParameterNames, moe_blocks

Role: TypeAlias = Literal["block", "embedding", "head", "gate"]
"""What a parameter is for. `block` is whatever is none of the others; a `gate` routes between MoE experts."""


@dataclass(frozen=True)
class Owner:
    """The module that owns a parameter: its role, whether it stores weights transposed, and when it runs."""

    role: Role
    transposed: bool
    order: tuple[int, int]


def parameter_owners(finetune: Checkpoint, names: Iterable[str]) -> dict[str, Owner]:
    """The owners of the parameters that transformers knows, by their names in the checkpoint."""
    try:
        model = skeleton(finetune.path)
    except CheckpointError:
        finetune.config  # noqa: B018  a missing one is an error; a model that transformers does not know is not
        return {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    gates = {id(gate) for _, block in moe_blocks(model) for gate in block.children() if not [*gate.children()]}
    owners: dict[str, Owner] = {}
    for at, (module_name, module) in enumerate(model.named_modules()):
        role: Role = "gate" if id(module) in gates else "block"
        if module is head or isinstance(module, nn.Embedding):
            role = "head" if module is head else "embedding"
        for number, (leaf, parameter) in enumerate(module.named_parameters(recurse=False)):
            # Stacked MoE experts lie one after another, each whole.
            order = (at, 0 if parameter.dim() > 2 else number)
            transposed = isinstance(module, Conv1D) and leaf == "weight"
            owners[f"{module_name}.{leaf}" if module_name else leaf] = Owner(role, transposed, order)
    return {name: owners[parameter] for name, parameter in ParameterNames(model).parameters(names).items()}
