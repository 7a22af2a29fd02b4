"""Base and fine-tune with the same parameters under the same names, whatever their files call them.

    base         h.0.attn.c_attn.weight                 …experts.3.up_proj.weight           rotary_emb.inv_freq
    fine-tune    transformer.h.0.attn.c_attn.weight     rows of …experts.gate_up_proj       (left out)

Two tensors are a pair if transformers loads them to the same place. Both then have the base's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch

from meswitch.errors import ArchitectureError, CheckpointError
from meswitch.huggingface.checkpoint import HEAD, Checkpoint, Source
from meswitch.huggingface.models import skeleton
from meswitch.huggingface.names import ParameterNames, Place

_HEAD = Place(HEAD)
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "a data-parallel wrapper", "base_model.model.": "peft"}


@dataclass(frozen=True)
class Pair:
    """A base and a fine-tune under the base's names. `own_names`: what the fine-tune's files call each of them."""

    base: Checkpoint
    finetune: Checkpoint
    own_names: dict[str, str]


def pair(base: Checkpoint, finetune: Checkpoint) -> Pair:
    """Pairs the parameters of two checkpoints.

    Left out are buffers of older versions that transformers leaves out and that one side alone has, and the head of a
    tied model whose file repeats its embedding. Models that transformers does not know are paired by name.

    Raises `ArchitectureError` for a tensor without its like, `CheckpointError` for a folder without a config.json.
    """
    ours, theirs = _Side(base), _Side(finetune)
    theirs.drop_repeated_head()
    if _HEAD not in theirs.names:
        ours.drop_repeated_head()
    sources: dict[str, Source] = {}
    for place in ours.names.keys() & theirs.names.keys():
        sources[ours.names.pop(place)] = finetune.source(theirs.names.pop(place))
    if _HEAD in theirs.names and HEAD in base:  # tied in the base alone
        sources[HEAD] = finetune.source(theirs.names.pop(_HEAD))
    in_base = [name for name in sources if name in base.names()]
    if _HEAD in ours.names and HEAD in finetune:  # tied in the fine-tune alone
        in_base.append(ours.names.pop(_HEAD))
    parts = _parts_of_stacks(ours, theirs)
    sources |= parts
    _refuse_unpaired(ours, theirs)
    return Pair(
        base.with_parameters({name: (name, None) for name in [*in_base, *parts]}),
        finetune.with_parameters(sources),
        {name: tensor for name, (tensor, _) in sources.items()},
    )


class _Side:
    """One checkpoint: the names of its tensors that are not paired yet, by the places they are loaded to."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model: ParameterNames | None = None
        try:
            self.model = ParameterNames(skeleton(checkpoint.path))
        except CheckpointError:
            checkpoint.config  # noqa: B018  raises where there is none
        names = checkpoint.names()
        self.names = {Place(name): name for name in names} if self.model is None else self.model.places(names)

    def drop_repeated_head(self) -> None:
        """Leaves out the head of a tied model that equals the embedding it is tied to."""
        source = None if self.model is None else self.model.tied_to(HEAD)
        if source is None or _HEAD not in self.names or Place(source) not in self.names:
            return
        head, embedding = (self.checkpoint.tensor(self.names[place]) for place in (_HEAD, Place(source)))
        if head.dtype == embedding.dtype and torch.equal(head, embedding):
            del self.names[_HEAD]

    def unpaired(self) -> list[str]:
        """The tensors without their like that transformers would not leave out."""
        return [name for name in self.names.values() if self.model is None or not self.model.left_out(name)]


def _parts_of_stacks(ours: _Side, theirs: _Side) -> dict[str, Source]:
    """The parts of the fine-tune's stacks of MoE experts that are single tensors in the base."""
    pieces: dict[str, list[Place]] = {}
    for place in ours.names:
        if place.piece and Place(place.parameter) in theirs.names:
            pieces.setdefault(place.parameter, []).append(place)
    parts: dict[str, Source] = {}
    for parameter, places in pieces.items():
        stacked = theirs.names[Place(parameter)]
        order = ours.model.stack(parameter, [ours.names[place] for place in places]) if ours.model is not None else None
        shapes = [] if order is None else [ours.checkpoint.shape(name) for name in order]
        if order is None or sum(map(prod, shapes)) != prod(theirs.checkpoint.shape(stacked)):
            raise _layout_error(ours.names[places[0]], stacked)
        start = 0
        for name, shape in zip(order, shapes, strict=True):
            parts[name] = (stacked, (start, list(shape)))
            start += prod(shape)
        del theirs.names[Place(parameter)]
        for place in places:
            del ours.names[place]
    return parts


def _refuse_unpaired(ours: _Side, theirs: _Side) -> None:
    """Raises `ArchitectureError` for a tensor without its like."""
    for place, name in theirs.names.items():
        other = next((name for known, name in ours.names.items() if known.parameter == place.parameter), None)
        if other is not None:
            raise _layout_error(other, name)
    missing, unknown = ours.unpaired(), theirs.unpaired()
    hint = _hint(ours.checkpoint.names(), unknown)
    if missing:
        raise ArchitectureError(f"expected the base's parameter {missing[0]} in the fine-tune, found none", hint=hint)
    if unknown:
        raise ArchitectureError(f"expected only parameters of the base, found {unknown[0]} in the fine-tune", hint=hint)


def _layout_error(base_name: str, finetune_name: str) -> ArchitectureError:
    return ArchitectureError(
        f"expected the layout of the base, which has {base_name}, found the same weights as {finetune_name}",
        hint="load the one whose layout is not the model's own in transformers and save it again (save_pretrained)",
    )


def _hint(base_names: Iterable[str], unknown: list[str]) -> str:
    """What is probably wrong with a fine-tune that has these names beyond the base's."""
    known = set(base_names)
    for wrapper, writer in _WRAPPERS.items():
        if any(wrapper in name and name.replace(wrapper, "") in known for name in unknown):
            return f"names with {wrapper!r} are those of {writer}: save the model that it wraps"
    if any(".lora_" in name for name in unknown):
        return "this seems to hold an adapter that was not merged: merge it (peft: merge_and_unload) and save that"
    return "a fine-tune has the parameters and shapes of its base; only embeddings and head may have more rows"
