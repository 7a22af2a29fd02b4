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
from meswitch.layers.moe import STACKS
from meswitch.moe.copies import packed_moe_experts
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
    moe_experts = packed_moe_experts(empty, names, loaded.values())
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
