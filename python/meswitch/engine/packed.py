"""A base that was quantized: its matrices stay packed, and transformers loads everything else.

    sites of matrices   one piece of memory, read and verified once ── the modules that own them (`layers/`)
    all other sites     decoded                                     ── transformers' model

A module's `weight` is then a tensor of NaNs that takes no memory: what asks for its shape, dtype or device is answered,
and what computes with it does not go unnoticed. Matrices that no module owns alone, such as those of MoE experts, are
decoded too.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from meswitch.delta.directory import Delta
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import LINEAR_MODULES, Check, is_transposed, load_model, placeholder, skeleton
from meswitch.huggingface.names import ParameterNames
from meswitch.site import DeltaSite, LowRankSite, QuantizedSite

_log = logging.getLogger(__name__)


def load_packed(
    base: Checkpoint, dtype: str | torch.dtype, check: Check | None = None
) -> tuple[Any, dict[str, DeltaSite]]:
    """The model of a quantized base, and by the names of its modules the weights that stay packed.

    Arguments and errors as in `load_model`, and `FormatError`, `ChecksumError` for a damaged directory.
    """
    loaded = Delta.open(base.path).load()
    sites = {name: site for name, site in loaded.items() if isinstance(site, QuantizedSite | LowRankSite)}
    empty = skeleton(base.path, None if isinstance(dtype, str) else dtype)
    parameters = ParameterNames(empty).parameters(sites)
    packed: dict[str, DeltaSite] = {}  # by parameter
    for name, parameter in parameters.items():
        module = empty.get_submodule(parameter.rpartition(".")[0])
        if _owns(module, parameter, sites[name]):
            packed[parameter] = sites[name]
    weights = dict(empty.named_parameters(remove_duplicate=False))
    placeholders = {
        name: placeholder(weights[parameter].shape, weights[parameter].dtype)
        for name, parameter in parameters.items()
        if parameter in packed
    }
    decoded = sorted(sites.keys() - placeholders.keys())
    if decoded:
        _log.warning("%s: %d matrices are decoded, %s for one", base.path, len(decoded), decoded[0])
    model = load_model(base, dtype, check=check, placeholders=placeholders)
    return model, _by_module(model, packed)


def _owns(module: nn.Module, parameter: str, site: DeltaSite) -> bool:
    """Whether a parameter is the weight of a module that has a product or a lookup of its own."""
    if not parameter.endswith(".weight") or not isinstance(module, (*LINEAR_MODULES, nn.Embedding)):
        return False
    return tuple(module.weight.shape) == site.shape and site.transposed == is_transposed(module)


def _by_module(model: nn.Module, packed: dict[str, DeltaSite]) -> dict[str, DeltaSite]:
    """The packed weights by module; modules that share a weight share its site."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_weight = {id(parameters[name]): site for name, site in packed.items()}
    modules = {id(module): name for name, module in reversed(list(model.named_modules()))}
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in by_weight and modules[id(module)] == name:
            found[name] = by_weight[id(weight)]
    return found
