"""The names of one parameter: in a checkpoint's files, in the model, in an adapter.

    file       h.0.attn.c_attn.weight      model.layers.3.block_sparse_moe.experts.5.w1.weight
    model      transformer.h.0.attn.…      model.layers.3.mlp.experts.gate_up_proj   (MoE experts are stacked)

A name may have the model's prefix (`transformer.`, `model.`) or lack it, and transformers renames tensors of older
files. Every search for a parameter goes through this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

T = TypeVar("T")


def spellings(name: str, prefix: str) -> tuple[str, ...]:
    """The names that a parameter may have instead of `name`: the same, with the model's prefix, and without it.

    >>> spellings("h.0.weight", "transformer"), spellings("transformer.h.0.weight", "transformer")[-1]
    (('h.0.weight', 'transformer.h.0.weight', 'h.0.weight'), 'h.0.weight')
    """
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


class ParameterNames:
    """The names of one model's parameters. The model may be on the meta device.

    Uses transformers' own conversion mapping, so a checkpoint's name means what `from_pretrained` takes it for.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        mapping = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]

    def spellings(self, name: str) -> tuple[str, ...]:
        """The names that a checkpoint's tensor may have in the model, if it becomes a parameter of its own."""
        return spellings(apply_renamings(name, self._renamings), self.prefix)

    def on_disk(self, names: Iterable[str]) -> dict[str, str]:
        """The checkpoint's name by the model's, of each parameter and buffer that is one tensor in `names`."""
        parameters = self._model.state_dict().keys()
        return {parameter: name for name in names for parameter in self.spellings(name) if parameter in parameters}

    def parameters(self, names: Iterable[str]) -> dict[str, str]:
        """The parameter that each of a checkpoint's tensors is loaded into, by the tensor's name.

        MoE experts are separate tensors on disk and one stack in a model. Tensors of no parameter are left out.
        """
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        renamed = {
            name: rename_source_key(name, self._renamings, self._converters, self.prefix, parameters)[0]
            for name in names
        }
        return {name: parameter for name, parameter in renamed.items() if parameter in parameters}

    def with_file_names(self, values: dict[str, T], names: Iterable[str]) -> dict[str, T]:
        """`values` by parameter, and again by each of the checkpoint's tensors (`names`) that is loaded into one."""
        parameters = self.parameters(names)
        return values | {name: values[parameter] for name, parameter in parameters.items() if parameter in values}


def moe_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of MoE experts with their names: modules that have a child `experts`."""
    for name, module in model.named_modules():
        if "experts" in module._modules:
            yield name, module
