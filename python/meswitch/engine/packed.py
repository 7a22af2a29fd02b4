"""A base that was quantized: its matrices stay packed, and transformers loads everything else.

    sites of matrices   one piece of memory, read and verified once ── the modules that own them (`layers/`)
    all other sites     decoded                                     ── transformers' model

A module's `weight` is then a tensor of NaNs that takes no memory: what asks for its shape, dtype or device is answered,
and what computes with it does not go unnoticed. So are the stacks of MoE experts in transformers' plain interface,
which are never made. Matrices of any other module are decoded too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from meswitch.delta.directory import Delta
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import (
    LINEAR_MODULES,
    Check,
    is_transposed,
    load_model,
    placeholder,
    skeleton,
    without_parameters,
)
from meswitch.huggingface.names import ParameterNames
from meswitch.layers.moe import STACKS, can_stay_packed
from meswitch.site import DeltaSite, LowRankSite, QuantizedSite

_log = logging.getLogger(__name__)


@dataclass
class Packed:
    """What a base keeps packed: weights by module, and by module the MoE experts as `PackedExperts` takes them."""

    weights: dict[str, DeltaSite] = field(default_factory=dict)
    moe_experts: dict[str, dict[str, list[list[DeltaSite]]]] = field(default_factory=dict)


def load_packed(base: Checkpoint, dtype: str | torch.dtype, check: Check | None = None) -> tuple[Any, Packed]:
    """The model of a quantized base, and what of it stays packed.

    Arguments and errors as in `load_model`, and `FormatError`, `ChecksumError` for a damaged directory.
    """
    loaded = Delta.open(base.path).load()
    sites = {name: site for name, site in loaded.items() if isinstance(site, QuantizedSite | LowRankSite)}
    empty = skeleton(base.path, None if isinstance(dtype, str) else dtype)
    names = ParameterNames(empty)
    owners = names.parameters(sites)
    weights = dict(empty.named_parameters(remove_duplicate=False))
    packed = {parameter: sites[name] for name, parameter in owners.items() if _owns(empty, parameter, sites[name])}
    moe_experts = _moe_experts(empty, names, owners, sites)
    placeholders = {
        name: placeholder(weights[parameter].shape, weights[parameter].dtype)
        for name, parameter in owners.items()
        if parameter in packed
    }
    stacked = {f"{module}.{stack}" for module in moe_experts for stack in STACKS}
    absent = {name for name, parameter in owners.items() if parameter in stacked}
    decoded = sorted(sites.keys() - placeholders.keys() - absent)
    if decoded:
        _log.warning("%s: %d matrices are decoded, %s for one", base.path, len(decoded), decoded[0])
    classes = {type(empty.get_submodule(module)) for module in moe_experts}
    with without_parameters(classes, STACKS):
        model = load_model(base, dtype, check=check, placeholders=placeholders, absent=absent)
    for module in moe_experts:
        for stack in STACKS:
            of = weights[f"{module}.{stack}"]
            setattr(model.get_submodule(module), stack, placeholder(of.shape, of.dtype))
    return model, Packed(_by_module(model, packed), moe_experts)


def _moe_experts(
    empty: nn.Module, names: ParameterNames, owners: dict[str, str], sites: dict[str, DeltaSite]
) -> dict[str, dict[str, list[list[DeltaSite]]]]:
    """The MoE experts that can stay packed, by module: all modules of a class, or none."""
    found: dict[str, dict[str, list[list[DeltaSite]]]] = {}
    refused: set[type] = set()
    on_disk: dict[str, list[str]] = {}  # the names of the tensors that become one parameter
    for name, parameter in owners.items():
        on_disk.setdefault(parameter, []).append(name)
    for name, module in empty.named_modules():
        if not any(stack in module._parameters for stack in STACKS):
            continue
        stacks = {stack: _stack(names, f"{name}.{stack}", on_disk, sites, module) for stack in STACKS}
        if can_stay_packed(module) and all(stacks.values()):
            found[name] = stacks
        else:
            refused.add(type(module))
    return {name: stacks for name, stacks in found.items() if type(empty.get_submodule(name)) not in refused}


def _stack(
    names: ParameterNames, parameter: str, on_disk: dict[str, list[str]], sites: dict[str, DeltaSite], module: nn.Module
) -> list[list[DeltaSite]]:
    """The sites of each MoE expert in a stack of them; none where it is no plain stack of matrices."""
    own = on_disk.get(parameter)
    order, weight = names.stack(parameter, own) if own else None, module._parameters.get(parameter.rpartition(".")[2])
    if order is None or weight is None or len(order) % len(weight):
        return []
    pieces = len(order) // len(weight)
    experts = [[sites[name] for name in order[start : start + pieces]] for start in range(0, len(order), pieces)]
    fits = all(
        sum(site.out_features for site in expert) == weight.shape[1]
        and all(site.in_features == weight.shape[2] and not site.transposed for site in expert)
        for expert in experts
    )
    return experts if fits else []


def _owns(empty: nn.Module, parameter: str, site: DeltaSite) -> bool:
    """Whether a parameter is the weight of a module that has a product or a lookup of its own."""
    module = empty.get_submodule(parameter.rpartition(".")[0])
    if not parameter.endswith(".weight") or not isinstance(module, (*LINEAR_MODULES, nn.Embedding)):
        return False
    return tuple(module.weight.shape) == site.shape and site.transposed == is_transposed(module)


def _by_module(model: nn.Module, packed: dict[str, DeltaSite]) -> dict[str, DeltaSite]:
    """The packed weights by module; modules that share a weight share its site."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_weight = {id(parameters[name]): site for name, site in packed.items()}
    weights = ((name, id(module._parameters.get("weight"))) for name, module in model.named_modules())
    return {name: by_weight[weight] for name, weight in weights if weight in by_weight}
