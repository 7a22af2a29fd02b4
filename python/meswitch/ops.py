"""The operations of mixed-expert batches on packed tokens. CPU only so far; `reference.py` is their truth.

A step packs the tokens of many requests one after another: `Rows` says which slot each belongs to, `SiteTable` holds
the deltas of one weight by slot, and an operation adds to every token what its own expert's delta makes of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from meswitch import _native
from meswitch.delta import Site

# From this many tokens of one expert on, exact arithmetic is quicker as a matrix product of torch over unpacked rows.
PREFILL = 16
# From this many tokens of one expert on, one product with base and delta together is quicker than one with each.
CROWD = 64
# Rows of activations that `linear` takes; none where the processor has no kernel for it.
MOST_TOKENS = _native.base_linear_tokens()
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_TILE = 1 << 24  # weights put together or unpacked at a time: 32 MiB at 16 bits
_spare = threading.local()  # the memory of a thread's last tile: new memory would cost more than what is written to it


class Rows:
    """Which slot each token of a packed step belongs to; −1 is the base.

    >>> Rows([0, -1, 0, 2]).tokens
    {0: [0, 2], 2: [3]}
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = list(slots)
        self.tokens: dict[int, list[int]] = {}
        for token, slot in enumerate(self.slots):
            if slot >= 0:
                self.tokens.setdefault(slot, []).append(token)
        self._without: dict[frozenset[int], tuple[Tensor, Rows]] = {}

    @cached_property
    def native(self) -> _native.Rows:
        """The same for the kernels."""
        return _native.Rows(self.slots)

    @cached_property
    def only(self) -> int | None:
        """The one slot that every token belongs to, if there is one."""
        first = next(iter(self.tokens), None)
        return first if first is not None and len(self.tokens[first]) == len(self.slots) else None

    @cached_property
    def most(self) -> int:
        """The tokens of the slot that has most of them."""
        return max(map(len, self.tokens.values()), default=0)

    @cached_property
    def groups(self) -> dict[int, Tensor]:
        """The tokens of each slot, `int64`; the base's are not among them."""
        return {slot: torch.tensor(tokens) for slot, tokens in self.tokens.items()}

    def without(self, slots: Iterable[int]) -> tuple[Tensor, Rows]:
        """The tokens of everybody else, `int64`, and the slots of those.

        >>> Rows([0, -1, 0, 2]).without([0])[0]
        tensor([1, 3])
        """
        left_out = frozenset(slots)
        if left_out not in self._without:
            left = [token for token, slot in enumerate(self.slots) if slot not in left_out]
            self._without[left_out] = torch.tensor(left, dtype=torch.int64), Rows([self.slots[at] for at in left])
        return self._without[left_out]

    @cached_property
    def tensor(self) -> Tensor:
        """The slots, `int64 [tokens]`."""
        return torch.tensor(self.slots, dtype=torch.int64)

    @cached_property
    def any(self) -> bool:
        """Whether any token belongs to an expert."""
        return bool(self.tokens)


class SiteTable:
    """The deltas of one weight `[out_features, in_features]`, by slot."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features, self.in_features = out_features, in_features
        self.native = _native.Table(out_features, in_features)
        self._sites: dict[int, Site] = {}
        self._matrices: dict[int, _native.Matrix] = {}

    def set(self, slot: int, site: Site | None) -> None:
        """Puts a site into a slot; none, or a `shared` one, empties it."""
        self._sites.pop(slot, None)
        self._matrices.pop(slot, None)
        self.native.set(slot, None)
        if site is not None and site.kind != "shared":
            delta = matrix(site)
            self.native.set(slot, delta)
            self._sites[slot], self._matrices[slot] = site, delta

    def get(self, slot: int) -> Site | None:
        return self._sites.get(slot)

    def matrix(self, slot: int) -> _native.Matrix | None:
        return self._matrices.get(slot)

    @property
    def occupied(self) -> bool:
        return bool(self._sites)


def matrix(site: Site) -> _native.Matrix:
    """A site's tensors as the kernels read them, without a copy. Raises `FormatError` where they do not fit."""
    parts = [
        (
            part.bits,
            part.zero,
            part.group_size or max(site.in_features, 1),
            None if part.rows is None else _memory(part.rows),
            _memory(part.codes),
            _memory(part.scales),
        )
        for part in site.parts
    ]
    salient, low_rank, sparse = None, None, None
    if site.salient is not None and site.salient_index is not None:
        salient = (_memory(site.salient_index), _memory(site.salient))
    if site.u is not None and site.v is not None:
        low_rank = (_memory(site.u), _memory(site.v))
    scales = None if site.column_scales is None else _memory(site.column_scales)
    if site.sparse is not None:
        sparse = (_memory(site.sparse.starts), _memory(site.sparse.gaps), _memory(site.sparse.values))
    return _native.Matrix(
        site.out_features, site.in_features, site.exponent, parts, scales, salient, low_rank, sparse, site
    )


def delta_linear(y: Tensor, x: Tensor, rows: Rows, table: SiteTable, *, exact: bool = False) -> None:
    """`y[t] += Δ̂ of its slot · x[t]`, in place.

    `x [..., in_features]`, `y [..., >= out_features]`, a row a token, float32, bfloat16 or float16, on the CPU. With
    `exact` the arithmetic is the reference's, in float32; else sums of neighbouring activations are rounded to
    16 bits and looked up (an error of a quarter of a per cent of what the delta adds, at most 0.4), unless scales
    change within 8 columns.
    Raises `ValueError` where shapes, dtypes or devices do not fit.
    """
    native_y, native_x = _rows(y, table.out_features), _rows(x, table.in_features)
    if not exact or rows.most < PREFILL:
        table.native.delta_linear(native_y, native_x, rows.native, exact)
        return
    x, y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for slot, tokens in rows.tokens.items():
        delta = table.matrix(slot)
        if delta is not None:
            _prefill(y, x, tokens, delta, table)


def reads(weight: Tensor) -> bool:
    """Whether `linear` takes this weight: bfloat16, whole, on the CPU of a processor that has a kernel."""
    fits = weight.dtype == torch.bfloat16 and weight.is_cpu and weight.dim() == 2 and weight.is_contiguous()
    return fits and MOST_TOKENS > 0


def linear(x: Tensor, sites: Sequence[tuple[Tensor, SiteTable, Rows | None]]) -> list[Tensor]:
    """`x · weightᵀ` of each `(weight, deltas, rows)`, and what each token's own delta adds to it; where `rows` is none,
    every token is the base's.

    `x [..., in_features]` contiguous bfloat16 of at most `MOST_TOKENS` rows, `weight [out_features, in_features]` one
    that `reads` takes. Summed in float32 and rounded once; the deltas' sums are looked up, as
    `delta_linear` does unless it is exact. All weights are read in one pass of all threads, which shares what it made
    of `x` where deltas scale its columns alike. Raises `ValueError` where shapes do not fit.
    """
    products, given = [], []
    for weight, table, rows in sites:
        products.append(x.new_empty(*x.shape[:-1], table.out_features))
        given.append((table.native, _memory(weight), None if rows is None else rows.native, products[-1].data_ptr()))
    _native.base_linear(_rows(x, x.shape[-1]), given)
    return products


def merges(weight: Tensor) -> bool:
    """Whether `merged` takes this weight: floats, whole, on the CPU."""
    return weight.dtype in _NAMES and weight.is_cpu and weight.dim() == 2 and weight.is_contiguous()


def merged(x: Tensor, weight: Tensor, delta: _native.Matrix, bias: Tensor | None = None) -> Tensor:
    """`x · (weight + Δ̂)ᵀ + bias`, rows of both put together a tile at a time; as `x` in dtype.

    `x [T, in_features]` in the weight's dtype, `weight [out_features, in_features]` one that `merges` takes. The sums
    are those of a restored checkpoint, in its dtype, or in float32 where the processor is quicker at that. Raises
    `ValueError` where shapes or dtypes do not fit.
    """
    dtype = torch.float32 if _wide_is_quicker(weight.dtype) else weight.dtype
    native, wide = _rows(weight, weight.shape[1]), x.to(dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=dtype)
    for start, count in _tiles(*weight.shape):
        tile = _tile(count, weight.shape[1], dtype)
        delta.merged(native, start, _rows(tile, weight.shape[1]))
        out = y[:, start : start + count]
        if bias is None:
            torch.mm(wide, tile.T, out=out)
        else:
            torch.addmm(bias[start : start + count].to(dtype), wide, tile.T, out=out)
    return y.to(x.dtype)


@cache
def _wide_is_quicker(dtype: torch.dtype) -> bool:
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


def _prefill(y: Tensor, x: Tensor, tokens: list[int], delta: _native.Matrix, table: SiteTable) -> None:
    """Tokens of one expert: rows unpacked a tile at a time, multiplied by torch."""
    everyone = len(tokens) == x.shape[0]
    index = slice(None) if everyone else torch.tensor(tokens)
    chosen = x[index].float()
    for start, count in _tiles(table.out_features, table.in_features):
        tile = _tile(count, table.in_features, torch.float32)
        delta.dense(start, count, tile.data_ptr())
        y[index, start : start + count] += (chosen @ tile.T).to(y.dtype)


def _tile(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Memory for some rows, until the next is asked for."""
    kept: Tensor | None = getattr(_spare, "tile", None)
    if kept is None or kept.dtype != dtype or kept.numel() < rows * columns:
        kept = _spare.tile = torch.empty(rows * columns, dtype=dtype)
    return kept[: rows * columns].view(rows, columns)


def _tiles(rows: int, columns: int) -> Iterable[tuple[int, int]]:
    """First row and number of rows of each tile."""
    step = max(1, _TILE // max(columns, 1))
    return ((start, min(step, rows - start)) for start in range(0, rows, step))


def delta_embedding(y: Tensor, ids: Tensor, rows: Rows, table: SiteTable, *, scale: float = 1.0) -> None:
    """`y[t] += scale · Δ̂ of its slot [ids[t], :]`, in place; ids beyond the delta's rows add nothing.

    `ids [T]` of integers, `y [T, in_features]`. Raises `ValueError` where shapes or dtypes do not fit.
    """
    native_y = _rows(y, table.in_features)
    if ids.shape != (len(rows.slots),):
        raise ValueError(f"expected {len(rows.slots)} ids, found {tuple(ids.shape)}")
    for slot, tokens in rows.tokens.items():
        delta = table.matrix(slot)
        if delta is not None:
            own = ids.tolist() if len(tokens) == len(rows.slots) else ids[tokens].tolist()
            delta.delta_embedding(native_y, tokens, own, scale)


def _rows(tensor: Tensor, width: int) -> tuple[int, int, int, str]:
    """A tensor `[..., >= width]` as the kernels see it: address, rows, elements from one to the next, dtype."""
    shape = tensor.shape
    full = shape[-1] if shape else 0
    if tensor.is_contiguous():
        count, stride = (tensor.numel() // full if full else 0), full
    elif len(shape) == 2 and tensor.stride(1) == 1:
        count = shape[0]
        stride = tensor.stride(0) if count > 1 else full  # the stride of a single row may be anything
    else:
        raise ValueError(f"expected rows of neighbouring elements, found strides {tensor.stride()}")
    if full < width or not tensor.is_cpu:
        raise ValueError(f"expected rows of {width} elements on the CPU, found {tuple(shape)} on {tensor.device}")
    return tensor.data_ptr(), count, stride, _NAMES.get(tensor.dtype, str(tensor.dtype))


def _memory(tensor: Tensor) -> tuple[int, int]:
    if not tensor.is_contiguous():
        raise ValueError("expected a site's tensors to be contiguous")
    return tensor.data_ptr(), tensor.nbytes
