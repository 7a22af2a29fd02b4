"""Embeddings: rows of Δ̂ by token id, and the rows of a grown vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from meswitch.errors import UnsupportedModelError
from meswitch.kernels.protocol import Kernels
from meswitch.layers.step import Step
from meswitch.layers.wrapper import Wrapper
from meswitch.site import DeltaSite, LowRankSite, QuantizedSite, ReplacedSite, Site


class _ExpertEmbedding(nn.Embedding):
    """Stands behind an embedding's class in its method order, so that a subclass's own scaling or offset stays."""

    def forward(self, input: Tensor) -> Tensor:
        wrapper: EmbeddingWrapper = self.__dict__["_expert_wrapper"]
        return wrapper.lookup(super().forward, input)


_classes: dict[type, type] = {}


def _expert_class(kind: type) -> type:
    if kind not in _classes:
        bases = (_ExpertEmbedding,) if kind is nn.Embedding else (kind, _ExpertEmbedding)
        _classes[kind] = type(f"Expert{kind.__name__}", bases, {})
    return _classes[kind]


class EmbeddingWrapper(Wrapper):
    """`nn.Embedding` and subclasses that call its lookup. `packed`: its weight where the base keeps it packed."""

    def __init__(
        self, name: str, module: nn.Embedding, step: Step, kernels: Kernels, packed: DeltaSite | None = None
    ) -> None:
        super().__init__(name, module, step, kernels)
        self.known, self.packed = module.num_embeddings, packed is not None
        self.deltas = kernels.embedding(module.num_embeddings, module.embedding_dim, packed)
        self.replaced: dict[int, Tensor] = {}
        self.added: dict[int, Tensor] = {}

    def check(self, leaf: str, site: Site) -> None:
        assert isinstance(self.module, nn.Embedding)
        code = type(self.module).forward.__code__
        if type(self.module).forward is not nn.Embedding.forward and "__class__" not in code.co_freevars:
            raise UnsupportedModelError(
                f"{site.name}: an embedding with a lookup of its own: {type(self.module).__name__}"
            )
        width, known = self.module.embedding_dim, site.shape[0] - site.added_rows
        fits = isinstance(site, ReplacedSite) or known <= self.known
        if leaf != "weight" or tuple(site.shape[1:]) != (width,) or not fits:
            raise self.shape_mismatch(site, (self.known, width), tuple(site.shape))

    def set(self, slot: int, leaf: str, site: Site) -> None:
        self.slots.add(slot)
        if isinstance(site, ReplacedSite):
            self.replaced[slot] = site.value.to(self.step.device)
        elif isinstance(site, QuantizedSite | LowRankSite):
            self.deltas.set(slot, site)
            if site.added is not None:
                self.added[slot] = site.added.to(self.step.device)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.deltas.set(slot, None)
        self.replaced.pop(slot, None)
        self.added.pop(slot, None)

    def attach(self) -> None:
        self._own_class = type(self.module)
        self.module.__dict__["_expert_wrapper"] = self
        self.module.__class__ = _expert_class(self._own_class)

    def detach(self) -> None:
        self.module.__class__ = self._own_class
        del self.module.__dict__["_expert_wrapper"]

    def lookup(self, base: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        """The base's rows of `ids`, each with what its expert changed."""
        rows = self.step.tokens
        base = self._decoded if self.packed else base
        if not self.active(rows):
            return base(ids)
        self.expect_rows(ids.numel(), rows)
        y = base(ids.clamp(max=self.known - 1))  # ids of a grown vocabulary get their rows below
        flat_y, flat_ids = y.view(-1, y.shape[-1]), ids.reshape(-1).long()
        if self.deltas.occupied:
            self.deltas.add(flat_y, flat_ids, rows)
        for slot in self.replaced.keys() & rows.tokens.keys():
            index = rows.groups[slot]
            flat_y[index] = self.replaced[slot][flat_ids[index]].to(y.dtype)
        for slot in self.added.keys() & rows.tokens.keys():
            index = rows.groups[slot]
            beyond = flat_ids[index] - self.known
            new = self.added[slot][beyond.clamp(min=0)].to(y.dtype)
            flat_y[index] = torch.where((beyond >= 0)[:, None], new, flat_y[index])
        return y

    def _decoded(self, ids: Tensor) -> Tensor:
        """The rows of a packed table."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return self.deltas.lookup(ids.reshape(-1).long(), weight.dtype).view(*ids.shape, -1)
