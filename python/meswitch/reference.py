"""The definition of every operation, in plain torch: written to be read, not to be fast.

A fast implementation anywhere else is correct if it agrees with this file. Nothing here keeps state or writes to its
arguments, except `delta_linear` and `delta_embedding`, which add to `y` in place.

The packed form of one row of b-bit codes (b = 1, 2, 4, 8), 8 / b codes a byte, here b = 2:

    columns   0 .. 7                          8 .. 15        ...    zeros after the last column
              [ 3 2 1 0 ] [ 7 6 5 4 ]         [ b bytes ]    ...    highest bits first

A 3-bit row is the 2-bit form of the low two bits followed by the 1-bit form of the high ones. Rows lie in blocks of
256, the last of w rows (what is left, rounded up to a multiple of 64; the missing ones are zeros), each transposed:

    block 0                                              block 1    the last
    [ byte 0 of 256 rows ] [ byte 1 of 256 rows ] ...    ...        [ byte 0 of w rows ] [ byte 1 of w rows ] ...

so one cache line holds the same columns of 64 rows. A part of at most 48 rows is padded to a multiple of 16 only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meswitch.site import DeltaSite, Part, QuantizedSite, ReplacedSite, SharedSite, Site, Sparse, from_matrix

BITS = (1, 2, 3, 4, 8)
"""The bit widths that codes may have."""

BLOCK_ROWS = 256
"""Rows whose packed bytes form one transposed block."""


def row_bytes(bits: int, columns: int) -> int:
    """Bytes of one packed row of `columns` codes.

    >>> [row_bytes(b, 256) for b in BITS]
    [32, 64, 96, 128, 256]
    >>> row_bytes(2, 257)
    66
    """
    return bits * -(-columns // 8)


def padded_rows(rows: int) -> int:
    """The number of rows that a part of `rows` rows takes space for.

    >>> [padded_rows(rows) for rows in (0, 1, 48, 49, 64, 300)]
    [0, 16, 48, 64, 64, 320]
    """
    multiple = 64 if rows > 48 else 16
    return -(-rows // multiple) * multiple


def part_bytes(bits: int, rows: int, columns: int) -> int:
    """Bytes of the packed codes of a part.

    >>> part_bytes(2, 70, 300)
    9728
    """
    return row_bytes(bits, columns) * padded_rows(rows)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes `uint8 [n, columns]`, each below 2**bits, into words `int32 [part_bytes / 4]`.

    >>> packed = pack(torch.tensor([[1, 2, 3, 0, 1], [3, 3, 3, 3, 2]], dtype=torch.uint8), 2).view(torch.uint8)
    >>> packed[[0, 1, 2, 16, 17]].tolist(), len(packed)
    ([57, 255, 0, 1, 2], 32)
    """
    packed = torch.zeros(padded_rows(len(codes)), row_bytes(bits, codes.shape[1]), dtype=torch.uint8)
    packed[: len(codes)] = pack_rows(codes, bits)
    return torch.cat([block.T.flatten() for block in packed.split(BLOCK_ROWS)]).view(torch.int32)


def unpack(words: Tensor, bits: int, rows: int, columns: int, wanted: Tensor | None = None) -> Tensor:
    """The inverse of `pack`: codes `uint8 [rows, columns]`, or `[n, columns]` of the rows `wanted int64 [n]`.

    `wanted` may be in any order; memory is allocated for these rows only.

    >>> codes = torch.arange(600, dtype=torch.uint8).view(2, 300) & 7
    >>> bool((unpack(pack(codes, 3), 3, 2, 300) == codes).all())
    True
    """
    packed, width = words.view(torch.uint8), row_bytes(bits, columns)
    wanted = torch.arange(rows) if wanted is None else wanted
    wanted_bytes = torch.empty(len(wanted), width, dtype=torch.uint8)
    block_numbers = wanted // BLOCK_ROWS
    for number, start in enumerate(range(0, rows, BLOCK_ROWS)):
        size = min(BLOCK_ROWS, padded_rows(rows) - start)
        block = packed[start * width : (start + size) * width].view(width, size)
        in_block = block_numbers == number
        wanted_bytes[in_block] = block[:, wanted[in_block] - start].T
    return unpack_rows(wanted_bytes, bits, columns)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Packs codes `uint8 [n, columns]` row by row into bytes `uint8 [n, row_bytes]`."""
    if bits == 3:
        return torch.cat([pack_rows(codes & 3, 2), pack_rows(codes >> 2, 1)], dim=1)
    n, columns = codes.shape
    padded = torch.zeros(n, row_bytes(bits, columns), 8 // bits, dtype=torch.uint8)
    padded.flatten(1)[:, :columns] = codes
    return (padded << torch.arange(0, 8, bits, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_rows`: codes `uint8 [n, columns]`."""
    if bits == 3:
        low = row_bytes(2, columns)
        return unpack_rows(packed[:, :low], 2, columns) | (unpack_rows(packed[:, low:], 1, columns) << 2)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed[:, :, None] >> shifts).bitwise_and_(2**bits - 1).flatten(1)[:, :columns]


def part_rows(part: Part, out_features: int) -> Tensor:
    """The row numbers of a part within its site, `int64 [n]`, rising."""
    return torch.arange(out_features) if part.rows is None else part.rows.long()


def expand_scales(scales: Tensor, group_size: int | None, columns: int) -> Tensor:
    """Scales of groups `[n, groups]` as one scale for each column: `[n, columns]`.

    >>> expand_scales(torch.tensor([[1.0, 2.0]]), 2, 3), expand_scales(torch.tensor([[5.0]]), None, 2)
    (tensor([[1., 1., 2.]]), tensor([[5., 5.]]))
    """
    return scales.repeat_interleave(group_size or max(columns, 1), dim=1)[:, :columns]


def dense(site: DeltaSite) -> Tensor:
    """Δ̂, the matrix that a site encodes: `float32 [out_features, in_features]`.

    The sum of all that the site has of:

        codes      2^exponent · row_scale[o, group(i)] · column_scale[i] · (code[o, i] − zero)
        low rank   2^exponent · u[o, :] · v[:, i]
        salient    2^exponent · value[o, k] at the input channels i = index[k]
        sparse     2^exponent · value of every entry at [o, i]
    """
    delta = torch.zeros(site.out_features, site.in_features)
    unit = 2.0**site.exponent
    if isinstance(site, QuantizedSite):
        for part in site.parts:
            codes = unpack(part.codes, part.bits, part.count, site.in_features).float()
            scales = expand_scales(part.scales.T.float(), part.group_size, site.in_features) * unit
            delta[part_rows(part, site.out_features)] = scales * (codes - part.zero)
        if site.column_scales is not None:
            delta *= site.column_scales.float()
    if site.low_rank is not None:
        delta += (site.low_rank.u.float() * unit) @ site.low_rank.v.float()
    if isinstance(site, QuantizedSite):
        if site.salient is not None:
            delta[:, site.salient.index.long()] += site.salient.values.float() * unit
        if site.sparse is not None:
            delta.index_put_(entries(site.sparse), site.sparse.values.float() * unit, accumulate=True)
    return delta


def served(site: Site, base: Tensor) -> Tensor:
    """The expert's parameter in exact arithmetic: base plus delta in float32; without a delta, in its stored dtype.

    `base`: the base's parameter of that name, in its own dtype.
    """
    if isinstance(site, ReplacedSite):
        return site.value
    if isinstance(site, SharedSite):
        return base
    old_rows = base[: site.base_rows].float() if base.dim() else base.float()
    weight = old_rows + from_matrix(dense(site), old_rows.shape, transposed=site.transposed)
    return weight if site.added is None else torch.cat([weight, site.added.float()])


def restored(site: Site, base: Tensor) -> Tensor:
    """`served`, rounded to the fine-tune's dtype: the parameter of the restored checkpoint."""
    return served(site, base).to(site.dtype)


def entries(sparse: Sparse) -> tuple[Tensor, Tensor]:
    """Row and column of every sparse entry, `int64 [entries]` each. A column is the sum of its row's gaps so far.

    >>> values = torch.ones(3).to(torch.float8_e5m2)
    >>> entries(Sparse(torch.tensor([0, 1, 3]), torch.tensor([9, 4, 2], dtype=torch.uint8), values))
    (tensor([0, 1, 1]), tensor([9, 4, 6]))
    """
    starts, summed = sparse.starts.long(), torch.zeros(len(sparse.gaps) + 1, dtype=torch.int64)
    torch.cumsum(sparse.gaps.long(), 0, out=summed[1:])
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    return rows, summed[1:] - summed[starts[rows]]


def delta_linear(y: Tensor, x: Tensor, slots: list[int], sites: dict[int, DeltaSite]) -> None:
    """`y[t] += Δ̂ · x[t]` with the site of slot `slots[t]`, in float32, in place. Slots without a site add nothing.

    `x [T, in_features]`, `y [T, out_features]`; slot −1 is the base.
    """
    for token, slot in enumerate(slots):
        if slot in sites:
            y[token] += (dense(sites[slot]) @ x[token].float()).to(y.dtype)


def delta_embedding(y: Tensor, ids: Tensor, slots: list[int], sites: dict[int, DeltaSite], scale: float = 1.0) -> None:
    """`y[t] += scale · Δ̂[ids[t]]` with the site of slot `slots[t]`, in place. Ids beyond the delta's rows add nothing.

    `ids int64 [T]`, `y [T, in_features]`; slot −1 is the base.
    """
    for token, slot in enumerate(slots):
        if slot in sites and int(ids[token]) < sites[slot].out_features:
            y[token] += (dense(sites[slot])[int(ids[token])] * scale).to(y.dtype)
