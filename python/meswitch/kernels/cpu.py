"""Native kernels on the CPU: the base's product, and what deltas add to it, at the speed of memory.

Which product is taken is decided here, for each module and step:

    one expert has 64 tokens or more     base and delta merged, a tile at a time, and multiplied by torch (prefill)
    few tokens, weights of 16 bits       base and deltas in one fused native call (decode), also for the modules that
                                         last took the same input right after this one (q, k and v; gate and up)
    otherwise                            the base module as it is, then the deltas

The operations themselves are functions on tensors; `reference.py` is their truth.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meswitch import _native
from meswitch.kernels import invariance
from meswitch.kernels.rows import Rows
from meswitch.site import DeltaSite, QuantizedSite

MERGE_TOKENS = 64
"""From so many tokens of one expert on, one product with base and delta merged is quicker than one with each."""

FUSED_TOKENS = _native.base_linear_tokens()
"""The most rows of activations that the fused product takes; 0 where the processor has no kernel for it."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TILE_WEIGHTS = 1 << 24  # merged or unpacked at a time: 32 MiB at 16 bits
# The memory of a thread's last tile: new memory would cost more than what is written to it.
_scratch = threading.local()


class CpuKernels:
    """The backend for models on the CPU."""

    name = "cpu"

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact
        self._last: tuple[CpuLinear, Tensor, Rows] | None = None  # who last took an input by the fused product

    def linear(
        self, module: nn.Module, forward: Callable[..., Tensor], out_features: int, in_features: int, *, many_rows: bool
    ) -> CpuLinear:
        return CpuLinear(self, module, forward, out_features, in_features, many_rows=many_rows)

    def embedding(self, rows: int, width: int) -> CpuEmbedding:
        return CpuEmbedding(rows, width)

    def note_input(self, linear: CpuLinear, x: Tensor, rows: Rows) -> None:
        """Records modules that receive the same input tensor, so that later steps compute them in one call."""
        if self._last is not None and self._last[1] is x and self._last[2] is rows:
            first = self._last[0]
            if linear is not first:
                first.followers.append(linear)
        else:
            self._last = linear, x, rows


class DeltaTable:
    """The deltas of one weight `[out_features, in_features]`, by slot, as the kernels read them."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.native = _native.Table(out_features, in_features)
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


class CpuLinear(DeltaTable):
    """A linear module of the base with the deltas of its weight."""

    def __init__(
        self,
        kernels: CpuKernels,
        module: nn.Module,
        forward: Callable[..., Tensor],
        out_features: int,
        in_features: int,
        *,
        many_rows: bool,
    ) -> None:
        super().__init__(out_features, in_features)
        self._kernels, self._module, self._forward = kernels, module, forward
        plain = not kernels.exact and type(module) is nn.Linear and "forward" not in module.__dict__
        self._merges = plain and many_rows
        self._fuses = plain and module.bias is None and has_fused_kernel(self.weight)
        self.followers: list[CpuLinear] = []
        self._ready: tuple[Rows, Tensor, Tensor] | None = None  # rows, an input, and the product already made of it

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._module.weight  # type: ignore[assignment]
        return weight

    def __call__(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        active = self.active(rows)
        if active and (merged := self._slots_to_merge(rows)):
            return self._merged_product(x, rows, merged)
        if self._fuses and 0 < x.numel() <= FUSED_TOKENS * self.in_features and _is_fusable(x):
            return self._fused_product(x, rows)
        y = self._forward(x, *args, **kwargs)
        if active:
            if x.is_contiguous() and y.is_contiguous():
                delta_linear(y, x, rows, self, exact=self._kernels.exact)
            else:
                flat = y.reshape(-1, self.out_features)
                self.add(flat, x.reshape(-1, self.in_features), rows)
                y = flat.view(y.shape)
        return y

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        delta_linear(y, x, rows, self, exact=self._kernels.exact)

    def _fused_product(self, x: Tensor, rows: Rows) -> Tensor:
        """The base's product with the deltas added; with it, those of the modules that last took the same input."""
        if self._ready is not None and self._ready[0] is rows and self._ready[1] is x:
            product, self._ready = self._ready[2], None
            return product
        for other in [other for other in self.followers if other._ready is not None]:
            # It did not take its product in the last step, so it is no longer computed with this one.
            self.followers.remove(other)
            other._ready = None
        product, *others = fused_linear(x, [linear._fused_site(x, rows) for linear in (self, *self.followers)])
        for other, y in zip(self.followers, others, strict=True):
            other._ready = rows, x, y
        self._kernels.note_input(self, x, rows)
        return product

    def _fused_site(self, x: Tensor, rows: Rows) -> tuple[Tensor, DeltaTable, Rows | None]:
        """This module as `fused_linear` takes it."""
        fits = x.numel() == len(rows) * self.in_features
        return self.weight, self, rows if fits and self.active(rows) else None

    def _slots_to_merge(self, rows: Rows) -> list[int]:
        """The slots with so many tokens that base and delta are merged for them."""
        if not self._merges or rows.most_tokens < MERGE_TOKENS or not can_merge(self.weight):
            return []
        return [slot for slot, own in rows.tokens.items() if len(own) >= MERGE_TOKENS and slot in self._matrices]

    def _merged_product(self, x: Tensor, rows: Rows, slots: list[int]) -> Tensor:
        """All tokens: those of `slots` by one merged product each, the others by the base and their deltas."""
        flat, bias = x.reshape(-1, self.in_features), self._module.bias
        if rows.only_slot is not None:
            y = merged_linear(flat, self.weight, self._matrices[rows.only_slot], bias)  # type: ignore[arg-type]
        else:
            y = flat.new_empty(len(flat), self.out_features)
            for slot in slots:
                index = rows.groups[slot]
                y[index] = merged_linear(flat[index], self.weight, self._matrices[slot], bias)  # type: ignore[arg-type]
            index, others = rows.without(slots)
            if len(others):
                part = self._forward(flat[index])
                delta_linear(part, flat[index], others, self)
                y[index] = part
        return y.view(*x.shape[:-1], self.out_features)


class CpuEmbedding(DeltaTable):
    """The deltas of an embedding table."""

    def add(self, y: Tensor, ids: Tensor, rows: Rows) -> None:
        delta_embedding(y, ids, rows, self)


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
            _exact_product(y, x, tokens, delta, table)


def has_fused_kernel(weight: Tensor) -> bool:
    """Whether `fused_linear` takes this weight: bfloat16, whole, on the CPU of a processor that has a kernel."""
    fits = weight.dtype == torch.bfloat16 and weight.is_cpu and weight.dim() == 2 and weight.is_contiguous()
    return fits and FUSED_TOKENS > 0


def fused_linear(x: Tensor, sites: Sequence[tuple[Tensor, DeltaTable, Rows | None]]) -> list[Tensor]:
    """`x · weightᵀ` of each `(weight, deltas, rows)`, and what each token's own delta adds to it.

    Where `rows` is `None`, every token is the base's.

    `x [..., in_features]` contiguous bfloat16 of at most `FUSED_TOKENS` rows, `weight [out_features, in_features]` one
    that `has_fused_kernel` takes. Summed in float32 and rounded once; the deltas' sums are looked up, as `delta_linear`
    does unless it is exact. All weights are read in one pass of all threads, which shares what it made of `x` where
    deltas scale its columns alike. Raises `ValueError` where shapes do not fit.
    """
    products, given = [], []
    for weight, table, rows in sites:
        products.append(x.new_empty(*x.shape[:-1], table.out_features))
        given.append((table.native, weight, None if rows is None else rows.native, products[-1]))
    _native.base_linear(x, given)
    return products


def can_merge(weight: Tensor) -> bool:
    """Whether `merged_linear` takes this weight: floats, whole, on the CPU."""
    return weight.dtype in _FLOATS and weight.is_cpu and weight.dim() == 2 and weight.is_contiguous()


def merged_linear(x: Tensor, weight: Tensor, delta: _native.Matrix, bias: Tensor | None = None) -> Tensor:
    """`x · (weight + Δ̂)ᵀ + bias`, base and delta merged a tile at a time; as `x` in dtype.

    `x [T, in_features]` in the weight's dtype, `weight [out_features, in_features]` one that `can_merge` takes. The
    sums are those of a restored checkpoint, in its dtype, or in float32 where the processor is quicker at that. Raises
    `ValueError` where shapes or dtypes do not fit.
    """
    dtype = torch.float32 if _float32_is_quicker(weight.dtype) else weight.dtype
    x_in_dtype = x.to(dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=dtype)
    for start, count in _tiles(*weight.shape):
        tile = _tile(count, weight.shape[1], dtype)
        delta.merged(weight, start, tile)
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


def _exact_product(y: Tensor, x: Tensor, tokens: list[int], delta: _native.Matrix, table: DeltaTable) -> None:
    """Tokens of one expert: rows unpacked a tile at a time, multiplied by torch in blocks of tokens."""
    index = slice(None) if len(tokens) == x.shape[0] else torch.tensor(tokens)
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


def _is_fusable(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.is_contiguous()
