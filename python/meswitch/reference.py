"""The truth of every operation, in plain torch: no speed, no branches for it.

A fast path anywhere else is right when it agrees with this file.

The packed form of one row of b-bit codes (b = 1, 2, 4, 8), m = 8 / b codes a byte:

    columns   0 .. 64m-1   64m .. 128m-1   ...   the rest, r columns
              [ 64 bytes ] [  64 bytes  ]  ...   [ w bytes ]      w = ceil(r / m), rounded up to 4

    in a run of w bytes (w = 64 in whole blocks), bits b*p .. b*p+b-1 of byte j hold column p*w + j

so one mask and one shift give w consecutive columns. A 3-bit row is the 2-bit form of the low two bits followed by
the 1-bit form of the high ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from meswitch.delta import Site, Sparse

BLOCK = 64  # bytes: one cache line, one AVX-512 register
BITS = (1, 2, 3, 4, 8)


def row_bytes(bits: int, columns: int) -> int:
    """Bytes of one packed row.

    >>> [row_bytes(b, 256) for b in BITS]
    [32, 64, 96, 128, 256]
    >>> row_bytes(2, 257)
    68
    """
    if bits == 3:
        return row_bytes(2, columns) + row_bytes(1, columns)
    per_byte = 8 // bits
    blocks, rest = divmod(columns, BLOCK * per_byte)
    return blocks * BLOCK + -(-rest // (4 * per_byte)) * 4


def _runs(bits: int, columns: int) -> list[tuple[int, int, int]]:
    """The runs of a row: (first byte, width in bytes, first column)."""
    per_byte = 8 // bits
    blocks, rest = divmod(columns, BLOCK * per_byte)
    runs = [(k * BLOCK, BLOCK, k * BLOCK * per_byte) for k in range(blocks)]
    if rest:
        runs.append((blocks * BLOCK, row_bytes(bits, rest), blocks * BLOCK * per_byte))
    return runs


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `uint8 [n, columns]` (each below 2**bits) to words `int32 [n, row_bytes / 4]`.

    >>> pack(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 8)
    tensor([[197121]], dtype=torch.int32)
    """
    n, columns = codes.shape
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=1)
    packed = torch.zeros(n, row_bytes(bits, columns), dtype=torch.uint8)
    for first, width, column in _runs(bits, columns):
        for plane in range(8 // bits):
            part = codes[:, column + plane * width : column + (plane + 1) * width]
            packed[:, first : first + part.shape[1]] |= part << (bits * plane)
    return packed.view(torch.int32)


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: words `int32 [n, row_bytes / 4]` to codes `uint8 [n, columns]`.

    >>> codes = torch.arange(600, dtype=torch.uint8).view(2, 300) & 7
    >>> bool((unpack(pack(codes, 3), 3, 300) == codes).all())
    True
    """
    packed = words.contiguous().view(torch.uint8)
    if bits == 3:
        low = row_bytes(2, columns) // 4
        return unpack(words[:, :low], 2, columns) | (unpack(words[:, low:], 1, columns) << 2)
    codes = torch.zeros(packed.shape[0], columns, dtype=torch.uint8)
    for first, width, column in _runs(bits, columns):
        for plane in range(8 // bits):
            part = codes[:, column + plane * width : column + (plane + 1) * width]
            part.copy_((packed[:, first : first + part.shape[1]] >> (bits * plane)) & (2**bits - 1))
    return codes


def dense(site: Site) -> Tensor:
    """The delta that a site stands for, `float32 [out_features, in_features]` (DESIGN: the codec).

    Δ̂[o, i] = row_scale[o, group(i)] · column_scale[i] · (code[o, i] − zero), then U·V, then the salient channels;
    or the sum of its sparse entries at [o, i].
    """
    delta = torch.zeros(site.out_features, site.in_features)
    unit = 2.0**site.exponent
    for part in site.parts:
        codes = unpack(part.codes, part.bits, site.in_features).float()
        size = part.group_size or max(site.in_features, 1)
        scales = part.scales.float().repeat_interleave(size, dim=1)[:, : site.in_features] * unit
        rows = slice(None) if part.rows is None else part.rows.long()
        delta[rows] = scales * (codes - part.zero)
    if site.column_scales is not None:
        delta *= site.column_scales.float()
    if site.u is not None and site.v is not None:
        delta += (site.u.float() * unit) @ site.v.float()
    if site.salient is not None and site.salient_index is not None:
        delta[:, site.salient_index.long()] += site.salient.float() * unit
    if site.sparse is not None:
        delta.index_put_(entries(site.sparse), site.sparse.values.float() * unit, accumulate=True)
    return delta


def entries(sparse: Sparse) -> tuple[Tensor, Tensor]:
    """Row and column of each sparse entry, `int64 [entries]` each: a column is the sum of its row's gaps so far.

    >>> from meswitch.delta import Sparse
    >>> values = torch.ones(3).to(torch.float8_e5m2)
    >>> entries(Sparse(torch.tensor([0, 1, 3]), torch.tensor([9, 4, 2], dtype=torch.uint8), values))
    (tensor([0, 1, 1]), tensor([9, 4, 6]))
    """
    starts, total = sparse.starts.long(), torch.zeros(len(sparse.gaps) + 1, dtype=torch.int64)
    torch.cumsum(sparse.gaps.long(), 0, out=total[1:])
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    return rows, total[1:] - total[starts[rows]]


def delta_linear(y: Tensor, x: Tensor, slots: list[int], sites: dict[int, Site]) -> None:
    """`y[t] += Δ̂ of slot slots[t] · x[t]`, in float32, in place; slot −1, or one without a site here, adds nothing.

    `x [T, in_features]`, `y [T, out_features]`.
    """
    for token, slot in enumerate(slots):
        if slot in sites:
            y[token] += (dense(sites[slot]) @ x[token].float()).to(y.dtype)


def delta_embedding(y: Tensor, ids: Tensor, slots: list[int], sites: dict[int, Site], scale: float = 1.0) -> None:
    """`y[t] += scale · Δ̂ of slot slots[t] [ids[t], :]`, in place; ids beyond the delta's rows add nothing."""
    for token, slot in enumerate(slots):
        if slot in sites and int(ids[token]) < sites[slot].out_features:
            y[token] += (dense(sites[slot])[int(ids[token])] * scale).to(y.dtype)
