"""The names of one parameter: in a checkpoint's files, in the model, in an adapter.

    file       h.0.attn.c_attn.weight      model.layers.3.block_sparse_moe.experts.5.w1.weight
    model      transformer.h.0.attn.…      model.layers.3.mlp.experts.gate_up_proj   (MoE experts are stacked)

A name may have the model's prefix (`transformer.`, `model.`) or lack it, and transformers renames tensors of older
files. Every search for a parameter goes through this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

T = TypeVar("T")


class StackPlace(NamedTuple):
    """Where a tensor lies in a stack of MoE experts `[MoE experts, rows, columns]`: whose it is, and which of those
    that lie one below another there."""

    parameter: str
    moe_expert: int
    piece: int


class Place(NamedTuple):
    """Where transformers loads a tensor to: a parameter or buffer, and which piece of it, if there are several.

    A tensor that it leaves out has its own name for a parameter.
    """

    parameter: str
    piece: str = ""


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
        self._stack_places: dict[str, StackPlace | None] = {}
        # Names alone: a model's parameters are not to be kept alive here.
        self._parameters = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}

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
        renamed = {
            name: rename_source_key(name, self._renamings, self._converters, self.prefix, self._parameters)[0]
            for name in names
        }
        return {name: parameter for name, parameter in renamed.items() if parameter in self._parameters}

    def places(self, names: Iterable[str]) -> dict[Place, str]:
        """A checkpoint's tensors by the places that they are loaded to, in the order in which transformers reads them.

        Of tensors with one place, the first counts.
        """
        state, places = self._model.state_dict(), dict[Place, str]()
        for name in sorted(names, key=dot_natural_key):
            parameter, pattern = rename_source_key(name, self._renamings, self._converters, self.prefix, state)
            if parameter not in state and name in state:
                parameter, pattern = name, None
            piece = "" if pattern is None else self.spellings(name)[-1]
            places.setdefault(Place(parameter, piece) if parameter in state else Place(name), name)
        return places

    def left_out(self, name: str) -> bool:
        """Whether a tensor is one that transformers knows to leave out: a buffer of older versions, say."""
        patterns = set(self._model._keys_to_ignore_on_load_unexpected or ())
        buffers = [buffer for buffer, _ in self._model.named_buffers()]
        if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
            patterns.add(r"rotary_emb\.inv_freq")  # of each layer in older versions, as transformers remembers
        if any(buffer.endswith("position_ids") for buffer in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return any(re.search(pattern, spelling) for pattern in patterns for spelling in self.spellings(name))

    def tied_to(self, parameter: str) -> str | None:
        """The parameter that this one is tied to, by the config."""
        source: str | None = getattr(self._model, "all_tied_weights_keys", {}).get(parameter)
        return source

    def stack_place(self, name: str) -> StackPlace | None:
        """Where transformers puts a checkpoint's tensor into a plain stack of MoE experts; `None` if it does not.

        A plain stack holds the tensors as they are, those of one MoE expert below each other.
        """
        if name not in self._stack_places:  # asked for once a fine-tune, and slow to find
            self._stack_places[name] = self._find_stack_place(name)
        return self._stack_places[name]

    def _find_stack_place(self, name: str) -> StackPlace | None:
        renamed = apply_renamings(name, self._renamings)
        for converter in self._converters:
            parameter, pattern = converter.rename_source_key(renamed)
            if pattern is None:
                continue
            number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), renamed)
            found = next((each for each in spellings(parameter, self.prefix) if each in self._parameters), None)
            if number is None or number.re.groups != 1 or found is None or not _stacks_rows(converter):
                return None
            return StackPlace(found, int(number[1]), converter.source_patterns.index(pattern))
        return None

    def stack(self, parameter: str, names: Iterable[str]) -> list[str] | None:
        """The order in which all tensors of a plain stack lie in it; `None` if it is none, or not all of it."""
        found = {name: self.stack_place(name) for name in names}
        places = {place: name for name, place in found.items() if place is not None and place.parameter == parameter}
        pieces = {place.piece for place in places}
        if len(places) != len(found) or len(places) != len(pieces) * len({place.moe_expert for place in places}):
            return None
        return [places[place] for place in sorted(places)]

    def moe_experts(self, names: Iterable[str]) -> dict[str, list[list[str]]]:
        """The tensors of each MoE expert in every parameter that is a plain stack of them, by parameter.

        The rows of one MoE expert's tensors lie one below another in its part of the stack.
        """
        tensors: dict[str, list[str]] = {}
        for place, name in self.places(names).items():
            if place.piece:
                tensors.setdefault(place.parameter, []).append(name)
        found, state = dict[str, list[list[str]]](), self._model.state_dict()
        for parameter, own in tensors.items():
            order, count = self.stack(parameter, own), len(state[parameter])
            if order is not None and len(order) % count == 0:
                pieces = len(order) // count
                found[parameter] = [order[start : start + pieces] for start in range(0, len(order), pieces)]
        return found

    def with_file_names(self, values: dict[str, T], names: Iterable[str]) -> dict[str, T]:
        """`values` by parameter, and again by each of the checkpoint's tensors (`names`) that is loaded into one."""
        parameters = self.parameters(names)
        return values | {name: values[parameter] for name, parameter in parameters.items() if parameter in values}


def _stacks_rows(converter: WeightConverter) -> bool:
    """Whether a conversion only puts matrices below each other, those of one MoE expert after another's."""
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    return operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def moe_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of MoE experts with their names: modules that have a child `experts`."""
    for name, module in model.named_modules():
        if "experts" in module._modules:
            yield name, module


def moe_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The gates of the blocks of MoE experts with their names: children that have parameters and no modules."""
    for block_name, block in moe_blocks(model):
        for name, child in block.named_children():
            if child._parameters and not child._modules and name != "experts":
                yield f"{block_name}.{name}", child
