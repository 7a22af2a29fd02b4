"""The CPU backend's operations as functions on tensors: products of packed matrices with tokens of many experts.

`reference.py` is their truth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from meswitch import _native
from meswitch.kernels import invariance
from meswitch.kernels.rows import Rows
from meswitch.site import DeltaSite, QuantizedSite

FUSED_TOKENS = _native.base_linear_tokens()
"""The most rows of activations that the fused product takes; 0 where the processor has no kernel for it."""

Weight: TypeAlias = Tensor | _native.Matrix
"""A weight of the base `[out_features, in_features]`: floats, or packed."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILE_WEIGHTS = 1 << 24  # merged or unpacked at a time: 32 MiB at 16 bits
# The memory of a thread's last tile: new memory would cost more than what is written to it.
_scratch = threading.local()


class DeltaTable:
    """The deltas of one weight `[out_features, in_features]`, by slot, as the kernels read them.

    `packed`: the weight itself, where the base keeps it packed.
    """

    def __init__(self, out_features: int, in_features: int, packed: DeltaSite | None = None) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.base = None if packed is None else native_matrix(packed)
        self.native = _native.Table(out_features, in_features, self.base)
        self._matrices: dict[int, _native.Matrix] = {}

    def set(self, slot: int, site: DeltaSite | None) -> None:
        """Puts a delta into a slot; `None` empties it. Raises `FormatError` where the site's tensors do not fit."""
        self._matrices.pop(slot, None)
        self.native.set(slot, None)
        if site is not None:
            matrix = native_matrix(site)
            self.native.set(slot, matrix)
            self._matrices[slot] = matrix

    def matrix(self, slot: int) -> _native.Matrix | None:
        return self._matrices.get(slot)

    def active(self, rows: Rows) -> bool:
        """Whether any token has a delta here."""
        return bool(self._matrices) and not self._matrices.keys().isdisjoint(rows.tokens)

    @property
    def occupied(self) -> bool:
        return bool(self._matrices)


def native_matrix(site: DeltaSite) -> _native.Matrix:
    """A site's tensors as the kernels read them, without a copy. Raises `FormatError` where they do not fit."""
    parts, column_scales, salient, sparse = [], None, None, None
    if isinstance(site, QuantizedSite):
        columns = max(site.in_features, 1)
        parts = [
            (part.bits, part.zero, part.group_size or columns, part.rows, part.codes, part.scales)
            for part in site.parts
        ]
        column_scales = site.column_scales
        salient = None if site.salient is None else (site.salient.index, site.salient.values)
        sparse = None if site.sparse is None else (site.sparse.starts, site.sparse.gaps, site.sparse.values)
    low_rank = None if site.low_rank is None else (site.low_rank.u, site.low_rank.v)
    return _native.Matrix(
        site.out_features, site.in_features, site.exponent, parts, column_scales, salient, low_rank, sparse
    )


def delta_linear(y: Tensor, x: Tensor, rows: Rows, table: DeltaTable, *, exact: bool = False) -> None:
    """`y[t] += Δ̂ of its slot · x[t]`, in place.

    `x [..., in_features]`, `y [..., >= out_features]`, a row a token, float32, bfloat16 or float16, on the CPU. With
    `exact` the arithmetic is the reference's, in float32, and a token's own whatever others come with it; else sums of
    neighbouring activations are rounded to 16 bits and looked up (an error of a quarter of a per cent of what the delta
    adds, at most 0.4), unless scales change within 8 columns.
    Raises `ValueError` where shapes, dtypes or devices do not fit.
    """
    if not exact:
        table.native.delta_linear(y, x, rows.native, False)
        return
    x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for slot, tokens in rows.tokens.items():
        delta = table.matrix(slot)
        if delta is not None:
            exact_product(y, x, tokens, delta, table)


def has_fused_kernel(weight: Tensor) -> bool:
    """Whether `fused_linear` takes this weight: bfloat16, whole, on the CPU of a processor that has a kernel."""
    fits = weight.dtype == torch.bfloat16 and weight.is_cpu and weight.dim() == 2 and weight.is_contiguous()
    return fits and FUSED_TOKENS > 0


def fused_linear(x: Tensor, sites: Sequence[tuple[Weight, DeltaTable, Rows | None]]) -> list[Tensor]:
    """`x · weightᵀ` of each `(weight, deltas, rows)`, and what each token's own delta adds to it.

    Where `rows` is `None`, every token is the base's.

    `x [..., in_features]` contiguous; `weight [out_features, in_features]` one that `has_fused_kernel` takes, with a
    bfloat16 `x` of at most `FUSED_TOKENS` rows, or the table's own packed one. Summed in float32 and rounded once; sums
    of packed weights and of deltas are looked up, as `delta_linear` does unless it is exact. All weights are read in
    one pass of all threads, which shares what it made of `x` where deltas scale its columns alike. Raises `ValueError`
    where shapes do not fit.
    """
    products, given = [], []
    for weight, table, rows in sites:
        products.append(x.new_empty(*x.shape[:-1], table.out_features))
        dense = weight if isinstance(weight, Tensor) else None
        given.append((table.native, dense, None if rows is None else rows.native, products[-1]))
    _native.base_linear(x, given)
    return products


def can_merge(weight: Weight) -> bool:
    """Whether `merged_linear` takes this weight: floats, whole, on the CPU, or packed."""
    if not isinstance(weight, Tensor):
        return True
    return weight.dtype in _FLOATS and weight.is_cpu and weight.dim() == 2 and weight.is_contiguous()


def merged_linear(x: Tensor, weight: Weight, delta: _native.Matrix | None, bias: Tensor | None = None) -> Tensor:
    """`x · (weight + Δ̂)ᵀ + bias`, base and delta merged a tile at a time; as `x` in dtype.

    `x [T, in_features]` in the weight's dtype, `weight [out_features, in_features]` one that `can_merge` takes. Only a
    packed one can come without a delta. The sums are those of a restored checkpoint, in its dtype, or in float32 where
    the processor is quicker at that. Raises `ValueError` where shapes or dtypes do not fit.
    """
    dtype = torch.float32 if _float32_is_quicker(x.dtype) else x.dtype
    x_in_dtype = x.to(dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=dtype)
    for start, count in _tiles(*weight.shape):
        tile = _tile(count, weight.shape[1], dtype)
        if isinstance(weight, Tensor):
            assert delta is not None
            delta.merged(weight, start, tile)
        else:
            weight.summed(delta, start, tile)
        out = y[:, start : start + count]
        if bias is None:
            torch.mm(x_in_dtype, tile.T, out=out)
        else:
            torch.addmm(bias[start : start + count].to(dtype), x_in_dtype, tile.T, out=out)
    return y.to(x.dtype)


@cache
def _float32_is_quicker(dtype: torch.dtype) -> bool:
    """Whether torch's products of float32 are quicker than those of `dtype`, by a third at least; timed once."""
    if dtype == torch.float32:
        return False
    x, weight = torch.ones(256, 1024), torch.ones(1024, 1024)

    def best(x: Tensor, weight: Tensor) -> float:
        spent = []
        for _ in range(4):
            start = time.perf_counter()
            F.linear(x, weight)
            spent.append(time.perf_counter() - start)
        return min(spent)

    return 4 * best(x, weight) < 3 * best(x.to(dtype), weight.to(dtype))


def exact_product(y: Tensor, x: Tensor, tokens: Sequence[int], delta: _native.Matrix, table: DeltaTable) -> None:
    """Tokens of one expert or a packed base: rows unpacked a tile at a time, multiplied by torch, blocks of tokens."""
    index = slice(None) if len(tokens) == x.shape[0] else torch.tensor(list(tokens))
    chosen = x[index].float()
    for start, count in _tiles(table.out_features, table.in_features):
        tile = _tile(count, table.in_features, torch.float32)
        delta.dense(start, tile)
        y[index, start : start + count] += invariance.linear(chosen, tile).to(y.dtype)


def _tile(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for some rows, until the next is asked for."""
    kept: Tensor | None = getattr(_scratch, "tile", None)
    if kept is None or kept.dtype != dtype or kept.numel() < rows * columns:
        kept = _scratch.tile = torch.empty(rows * columns, dtype=dtype)
    return kept[: rows * columns].view(rows, columns)


def _tiles(rows: int, columns: int) -> Iterable[tuple[int, int]]:
    """First row and number of rows of each tile."""
    step = max(1, _TILE_WEIGHTS // max(columns, 1))
    return ((start, min(step, rows - start)) for start in range(0, rows, step))


def delta_embedding(y: Tensor, ids: Tensor, rows: Rows, table: DeltaTable, *, scale: float = 1.0) -> None:
    """`y[t] += scale · Δ̂ of its slot [ids[t], :]`, in place; ids beyond the delta's rows add nothing.

    `ids [T]` of integers, `y [T, in_features]`. Raises `ValueError` where shapes or dtypes do not fit.
    """
    if ids.shape != (len(rows),):
        raise ValueError(f"expected {len(rows)} ids, found {tuple(ids.shape)}")
    for slot, tokens in rows.tokens.items():
        delta = table.matrix(slot)
        if delta is not None:
            own = ids.tolist() if len(tokens) == len(rows) else ids[tokens].tolist()
            delta.delta_embedding(y, tokens, own, scale)
