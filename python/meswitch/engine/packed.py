"""A base that was quantized: its matrices stay packed, and transformers loads everything else.

    sites of matrices   one piece of memory, read and verified once ── the modules that own them (`layers/`)
    all other sites     decoded                                     ── transformers' model

A module's `weight` is then a tensor of NaNs that takes no memory: what asks for its shape, dtype or device is answered,
and what computes with it does not go unnoticed. So are the stacks of MoE experts in transformers' plain interface,
which are never made. Matrices of any other module are decoded too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

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
from meswitch.huggingface.names import ParameterNames, StackPlace
from meswitch.layers.moe import STACKS, fits, has_moe_experts, is_plain
from meswitch.site import DeltaSite, LowRankSite, QuantizedSite, Site

_log = logging.getLogger(__name__)


@dataclass
class Packed:
    """What a base keeps packed: weights by module, and the sites of MoE experts by the module that holds them."""

    weights: dict[str, DeltaSite] = field(default_factory=dict)
    moe_experts: dict[str, list[Site]] = field(default_factory=dict)


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
    moe_experts = _moe_experts(empty, names, loaded.values())
    placeholders = {
        name: placeholder(weights[parameter].shape, weights[parameter].dtype)
        for name, parameter in owners.items()
        if parameter in packed
    }
    absent = {site.name for module in moe_experts.values() for site in module}
    decoded = sorted(sites.keys() - placeholders.keys() - absent)
    if decoded:
        _log.warning("%s: %d matrices are decoded, %s for one", base.path, len(decoded), decoded[0])
    classes = {type(empty.get_submodule(module)) for module in moe_experts}
    with without_parameters(classes, STACKS):
        model = load_model(base, dtype, check=check, placeholders=placeholders, absent=absent)
    for module in moe_experts:
        for stack in STACKS:
            of = weights[f"{module}.{stack}"]
            stands_for_it = nn.Parameter(placeholder(of.shape, of.dtype), requires_grad=False)
            setattr(model.get_submodule(module), stack, stands_for_it)
    return model, Packed(_by_module(model, packed), moe_experts)


def _moe_experts(empty: nn.Module, names: ParameterNames, sites: Iterable[Site]) -> dict[str, list[Site]]:
    """The sites of MoE experts that can stay packed, by module: all modules of a class, or none."""
    stacked: dict[str, dict[StackPlace, Site]] = {}
    for site in sites:
        place = names.stack_place(site.name)
        if place is not None:
            stacked.setdefault(place.parameter.rpartition(".")[0], {})[place] = site
    holders = {name: module for name, module in empty.named_modules() if has_moe_experts(module)}
    refused = {type(module) for name, module in holders.items() if not _fills(module, name, stacked.get(name, {}))}
    return {name: list(stacked[name].values()) for name, module in holders.items() if type(module) not in refused}


def _fills(module: nn.Module, name: str, sites: dict[StackPlace, Site]) -> bool:
    """Whether sites are all of a module's MoE experts, in the form that is served."""
    if not is_plain(module):
        return False
    for stack in STACKS:
        weight: Tensor = module._parameters[stack]  # type: ignore[assignment]
        own = {place: site for place, site in sites.items() if place.parameter == f"{name}.{stack}"}
        whole = sum(prod(site.shape) for site in own.values()) == weight.numel()
        if not whole or not all(fits(site, place, weight) for place, site in own.items()):
            return False
    return True


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
