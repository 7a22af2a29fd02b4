"""What a backend offers to the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from meswitch.kernels.rows import Rows
from meswitch.site import DeltaSite


class DeltaLinear(Protocol):
    """One linear module of the base, and the deltas of its weight by slot."""

    @property
    def occupied(self) -> bool:
        """Whether any slot has a delta."""

    def set(self, slot: int, site: DeltaSite | None) -> None:
        """Puts a delta into a slot, or empties it. Raises `FormatError` where the site's tensors do not fit."""

    def __call__(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        """The base module's output on `x [..., in_features]`, and on every token what the delta of its slot adds.

        `rows` has one entry a row of `x`, except where none of its slots has a delta here.
        """

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        """`y[t] += Δ̂ of its slot · x[t]`, in place; `x [T, in_features]`, `y [T, out_features]`."""


class DeltaEmbedding(Protocol):
    """The deltas of one embedding table by slot."""

    @property
    def occupied(self) -> bool:
        """Whether any slot has a delta."""

    def set(self, slot: int, site: DeltaSite | None) -> None:
        """Puts a delta into a slot, or empties it. Raises `FormatError` where the site's tensors do not fit."""

    def add(self, y: Tensor, ids: Tensor, rows: Rows) -> None:
        """`y[t] += Δ̂ of its slot [ids[t], :]`, in place; ids beyond the delta's rows add nothing.

        `ids int64 [T]`, `y [T, width]`.
        """

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """The base's own rows `[T, width]` of a packed table, for `ids int64 [T]`."""


class Kernels(Protocol):
    """A backend. `exact` asks for the reference's arithmetic: sums of float32 products, nothing rounded within them."""

    name: str
    exact: bool

    def linear(
        self,
        module: nn.Module,
        forward: Callable[..., Tensor],
        out_features: int,
        in_features: int,
        *,
        many_rows: bool,
        packed: DeltaSite | None = None,
    ) -> DeltaLinear:
        """For a linear `module` of the base whose own forward is `forward`.

        `many_rows`: whether it sees every token of a prefill (lm_head sees one row a request). `packed`: the module's
        weight where the base keeps it packed, as a delta on nothing; then `forward` is not called.
        """

    def embedding(self, rows: int, width: int, packed: DeltaSite | None = None) -> DeltaEmbedding:
        """For a table `[rows, width]`; `packed` as above."""

    def settle(self) -> None:
        """Every delta that was set is there for what runs from now on. To be called after some were set."""
