"""lm_head: one row a request, perhaps tied to the embeddings, and as wide as the largest vocabulary in play."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meswitch.kernels.protocol import DeltaLinear, Kernels
from meswitch.kernels.rows import Rows
from meswitch.layers.linear import LinearWrapper
from meswitch.layers.step import Step
from meswitch.reference import restored
from meswitch.site import DeltaSite, LowRankSite, QuantizedSite, ReplacedSite, Site


class HeadWrapper(LinearWrapper):
    """The output embeddings of the model.

    `kept`: whether it sees the kept rows alone. A slot in `tied` answers with its embeddings, though the base has a
    head of its own. `widths`: the vocabulary of slots that have another than the base's; logits beyond an expert's own
    are −∞. `added`, `added_bias`: what a grown vocabulary has beyond the base's.
    """

    many_rows = False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        step: Step,
        kernels: Kernels,
        packed: DeltaSite | None = None,
        *,
        embedding: nn.Module,
        packed_embedding: DeltaSite | None,
        kept: bool,
    ) -> None:
        super().__init__(name, module, step, kernels, packed)
        self.embedding, self.packed_embedding, self.kept = embedding, packed_embedding, kept
        self.tied: set[int] = set()
        self.widths: dict[int, int] = {}
        self.added: dict[int, Tensor] = {}
        self.added_bias: dict[int, Tensor] = {}

    @property
    def rows(self) -> Rows:
        return self.step.kept if self.kept else self.step.tokens

    def check(self, leaf: str, site: Site) -> None:
        known = site.shape[0] - site.added_rows
        right = known <= self.out_features and tuple(site.shape[1:]) == (() if leaf == "bias" else (self.in_features,))
        if not right and not isinstance(site, ReplacedSite):
            raise self.shape_mismatch(site, (self.out_features, self.in_features), tuple(site.shape))

    def set(self, slot: int, leaf: str, site: Site) -> None:
        super().set(slot, leaf, site)
        rows, device = site.shape[0], self.step.device
        if leaf == "bias":
            base = self.own_bias
            if rows > self.out_features and base is not None:
                self.added_bias[slot] = restored(site, base.cpu())[self.out_features :].to(device)
            return
        self.widths[slot] = rows
        if isinstance(site, QuantizedSite | LowRankSite) and site.added is not None:
            self.added[slot] = site.added.to(device)
        elif isinstance(site, ReplacedSite) and rows > self.out_features:
            self.added[slot] = site.value[self.out_features :].to(device)

    def tie(self, slot: int) -> None:
        """This slot's head is its embeddings, though the base's is not."""
        self.slots.add(slot)
        self.tied.add(slot)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.tied.discard(slot)
        for by_slot in (self.widths, self.added, self.added_bias):
            by_slot.pop(slot, None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(x, *args, **kwargs)
        return self._widened(y, x.reshape(-1, self.in_features), self.rows)

    def weighted(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        tied = self.tied & rows.groups.keys()
        if not tied:
            return super().weighted(x, rows, *args, **kwargs)
        y = self.base_forward(x, *args, **kwargs)
        flat_x, flat_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        for slot in tied:
            index = rows.groups[slot]
            flat_y[index] = self._embedding_product(flat_x[index])
        self.product.add(flat_y, flat_x, rows)
        product: Tensor = flat_y.view(y.shape)
        return product

    def _embedding_product(self, x: Tensor) -> Tensor:
        """The base's embedding as a head."""
        if self._packed_product is not None:
            return self._packed_product(x, Rows([]))
        return F.linear(x, self.embedding.weight, self.own_bias)  # type: ignore[arg-type]

    @cached_property
    def _packed_product(self) -> DeltaLinear | None:
        """The product with the base's embedding where that is packed."""
        site = self.packed_embedding
        if site is None:
            return None
        return self.kernels.linear(
            self.module, self.base_forward, site.out_features, site.in_features, many_rows=False, packed=site
        )

    def _widened(self, y: Tensor, x: Tensor, rows: Rows) -> Tensor:
        """`y` with the logits of grown vocabularies, −∞ where a row's expert has none."""
        widths = {slot: self.widths.get(slot, self.out_features) for slot in rows.tokens}
        if all(width == self.out_features for width in widths.values()):
            return y
        widest = max(self.out_features, *widths.values())
        wide = y.new_full((*y.shape[:-1], widest), -torch.inf).view(-1, widest)
        wide[:, : self.out_features] = y.reshape(-1, self.out_features)
        for slot, index in rows.groups.items():
            if slot in self.added:
                extra = F.linear(x[index], self.added[slot].to(x.dtype), self.added_bias.get(slot))
                wide[index, self.out_features : widths[slot]] = extra
            wide[index, widths[slot] :] = -torch.inf
        return wide.view(*y.shape[:-1], widest)
