"""Linear modules: the base's product, the delta of each row's expert, and the expert's bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from meswitch.errors import UnsupportedModelError
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.rows import Rows
from meswitch.layers.bank import Bank
from meswitch.layers.step import Step
from meswitch.layers.wrapper import Wrapper
from meswitch.reference import restored
from meswitch.site import DeltaSite, LowRankSite, QuantizedSite, ReplacedSite, Site


class LinearWrapper(Wrapper):
    """`nn.Linear` (and quantized forms of it) and GPT-2's `Conv1D`.

    `packed`: the module's weight, where the base keeps it packed. A slot's weight is a delta on the base's, or
    `replaced` by one of its own; its bias is a difference in a `Bank`, since the base module has already added its own.
    """

    many_rows = True  # every token of a prefill comes here

    def __init__(
        self, name: str, module: nn.Module, step: Step, kernels: Kernels, packed: DeltaSite | None = None
    ) -> None:
        super().__init__(name, module, step, kernels)
        self.transposed = isinstance(module, Conv1D)
        out_features, in_features = ("nf", "nx") if self.transposed else ("out_features", "in_features")
        self.out_features, self.in_features = int(getattr(module, out_features)), int(getattr(module, in_features))
        self.product = kernels.linear(
            module, self.base_forward, self.out_features, self.in_features, many_rows=self.many_rows, packed=packed
        )
        if packed is not None:
            self.base_forward = lambda x, *_, **__: self.product(x, Rows([]))
        self.replaced: dict[int, Tensor] = {}
        self.bias: Bank | None = None

    @property
    def rows(self) -> Rows:
        """The rows that this module sees."""
        return self.step.tokens

    @property
    def own_bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def check(self, leaf: str, site: Site) -> None:
        if leaf not in ("weight", "bias"):
            raise UnsupportedModelError(f"{site.name}: unknown parameter of {type(self.module).__name__}: {leaf}")
        own = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        expected = (self.out_features,) if leaf == "bias" else own
        if tuple(site.shape) != expected or site.added_rows:
            raise self.shape_mismatch(site, expected, tuple(site.shape))
        if leaf == "weight" and not isinstance(site, ReplacedSite) and site.transposed != self.transposed:
            raise self.shape_mismatch(site, f"transposed={self.transposed}", f"transposed={site.transposed}")

    def set(self, slot: int, leaf: str, site: Site) -> None:
        self.slots.add(slot)
        if leaf == "bias":
            self._set_bias(slot, site)
        elif isinstance(site, ReplacedSite):
            value = site.value.T if self.transposed else site.value
            self.replaced[slot] = value.to(self.step.device)
        elif isinstance(site, QuantizedSite | LowRankSite):
            self.product.set(slot, site)

    def _set_bias(self, slot: int, site: Site) -> None:
        base = self.own_bias
        assert base is not None
        if self.bias is None:
            self.bias = Bank(torch.zeros(self.out_features, dtype=base.dtype, device=base.device))
        own = base.cpu()
        self.bias.set(slot, restored(site, own)[: self.out_features].float() - own.float())

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.replaced.pop(slot, None)
        self.product.set(slot, None)
        if self.bias is not None:
            self.bias.clear(slot)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.rows
        if not self.active(rows):
            return self.product(x, rows, *args, **kwargs)
        self.expect_rows(x.numel() // self.in_features, rows)
        y = self.weighted(x, rows, *args, **kwargs)
        if self.replaced or self.bias is not None:
            flat_x, flat_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
            self._replace_rows(flat_y, flat_x, rows)
            y = flat_y.view(y.shape)
        return y

    def weighted(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output with the deltas of the weight."""
        return self.product(x, rows, *args, **kwargs)

    def _replace_rows(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        """Rows whose expert has a weight of its own, and every expert's bias."""
        for slot in self.replaced.keys() & rows.groups.keys():
            index = rows.groups[slot]
            weight = self.replaced[slot][: self.out_features].to(x.dtype)
            y[index] = F.linear(x[index], weight, self.own_bias)
        if self.bias is not None:
            y += self.bias.gather(rows, self.step.last_slot)
