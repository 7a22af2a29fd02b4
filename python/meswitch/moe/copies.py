"""Low-bit copies of MoE experts: the matrices of a quantized model that modules of MoE experts can multiply packed."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

from torch import Tensor, nn

from meswitch.delta.directory import Delta
from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import skeleton
from meswitch.huggingface.names import ParameterNames, StackPlace
from meswitch.layers.moe import STACKS, fits, has_moe_experts, is_plain
from meswitch.site import Site


def load_copies(folder: Path, base: Checkpoint) -> dict[str, list[Site]]:
    """The copies in a directory that `quantize` made of `base`, by module of MoE experts; read into memory and checked.

    Raises what `find_copies` raises, also for what is damaged in its tensors.
    """
    delta, found = find_copies(folder, base)
    return {name: [delta.sites[site.name] for site in sites] for name, sites in found.items()}


def find_copies(folder: Path, base: Checkpoint) -> tuple[Delta, dict[str, list[Site]]]:
    """The directory, and the sites of copies in it, by module, with tensors that have no content (`Delta.outline`).

    Raises `BaseMismatchError` for one that was made of another model, `FormatError` or `ChecksumError` for one that is
    damaged, and `UnsupportedModelError` where not every MoE expert can stay packed.
    """
    if not Checkpoint(folder).is_quantized:
        raise UnsupportedModelError(
            f"moe_copies: expected a model that quantize made, found a plain checkpoint: {folder}",
            hint="meswitch quantize MODEL -o COPIES --bits 2",
        )
    delta = Delta.open(folder)
    delta.check_base(base)
    empty = skeleton(base.path)
    found = packed_moe_experts(empty, ParameterNames(empty), delta.outline.values())
    for name, module in empty.named_modules():
        if has_moe_experts(module) and name not in found:
            raise UnsupportedModelError(
                f"{name}: expected MoE experts whose low-bit copies can be multiplied, found {type(module).__name__}",
                hint='serve the model with moe_mode="exact"',
            )
    return delta, found


def packed_moe_experts(empty: nn.Module, names: ParameterNames, sites: Iterable[Site]) -> dict[str, list[Site]]:
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
