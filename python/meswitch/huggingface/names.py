"""What a parameter is called: in a checkpoint's files, in the model, in an adapter.

    file       h.0.attn.c_attn.weight      model.layers.3.block_sparse_moe.experts.5.w1.weight
    model      transformer.h.0.attn.…      model.layers.3.mlp.experts.gate_up_proj   (MoE experts are stacked)

A name is spelt with or without the model's prefix (`transformer.`, `model.`), and transformers renames what older
files call otherwise. Whoever looks for a parameter asks here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

T = TypeVar("T")


def spellings(name: str, prefix: str) -> tuple[str, ...]:
    """A name as it stands, with the model's prefix, and without it.

    >>> spellings("h.0.weight", "transformer"), spellings("transformer.h.0.weight", "transformer")[-1]
    (('h.0.weight', 'transformer.h.0.weight', 'h.0.weight'), 'h.0.weight')
    """
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


class ParameterNames:
    """The names of one model's parameters. The model may stand on the meta device.

    Built from transformers' own conversion mapping, so that a name is read as `from_pretrained` reads it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        mapping = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in mapping if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in mapping if isinstance(transform, WeightConverter)]

    def spellings(self, name: str) -> tuple[str, ...]:
        """The names that a checkpoint's tensor may have in the model, where it becomes a parameter of its own."""
        return spellings(apply_renamings(name, self._renamings), self.prefix)

    def on_disk(self, names: Iterable[str]) -> dict[str, str]:
        """The checkpoint's name of each parameter and buffer of the model that `names` has one to one."""
        known = self._model.state_dict().keys()
        return {own: name for name in names for own in self.spellings(name) if own in known}

    def parameters(self, names: Iterable[str]) -> dict[str, str]:
        """The parameter that each of a checkpoint's tensors becomes, or becomes a part of, when it is loaded.

        MoE experts are single tensors on disk and stacked in a model. Names that become no parameter are left out.
        """
        known = dict(self._model.named_parameters(remove_duplicate=False))
        found = {
            name: rename_source_key(name, self._renamings, self._converters, self.prefix, known)[0] for name in names
        }
        return {name: parameter for name, parameter in found.items() if parameter in known}

    def with_file_names(self, values: dict[str, T], names: Iterable[str]) -> dict[str, T]:
        """What belongs to the model's parameters, also under the names of the checkpoint's tensors (`names`)."""
        found = self.parameters(names)
        return values | {name: values[parameter] for name, parameter in found.items() if parameter in values}


def moe_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that route between MoE experts, and their names; each has a child `experts`."""
    for name, module in model.named_modules():
        if "experts" in module._modules:
            yield name, module
