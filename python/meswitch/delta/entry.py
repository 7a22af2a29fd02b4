"""A site as an entry of the manifest says it is, and its tensors from wherever they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import FormatError
from meswitch.huggingface.checkpoint import DTYPES
from meswitch.site import (
    LowRank,
    LowRankSite,
    Part,
    QuantizedSite,
    ReplacedSite,
    Salient,
    SharedSite,
    Site,
    Sparse,
    matrix_shape,
)

ReadTensor = Callable[[str, torch.dtype, Sequence[int]], Tensor]
"""Gives a tensor of the site by role, dtype and shape, which may leave one length open as −1."""


def site_of(entry: dict[str, Any], read: ReadTensor) -> Site:
    """The site that `entry` describes, as docs/format.md says. Raises `FormatError` for a dtype that torch has not."""
    kind, dtype = entry["kind"], DTYPES.get(entry["dtype"])
    if dtype is None:
        raise FormatError(f"{entry['name']}: expected a dtype that torch has, found {entry['dtype']}")
    transposed, added = entry.get("transposed", False), entry.get("added", 0)
    common: dict[str, Any] = {
        "name": entry["name"],
        "shape": tuple(entry["shape"]),
        "dtype": dtype,
        "transposed": transposed,
        "nbytes": entry["bytes"],
        "relative_error": entry["relative_error"],
    }
    if kind == "shared":
        return SharedSite(**common)
    if kind == "replaced":
        return ReplacedSite(**common, value=read("whole", dtype, entry["shape"]))
    rows, columns = matrix_shape(entry["shape"], transposed=transposed, added_rows=added)
    common["exponent"] = entry.get("exponent", 0)
    if added:
        common["added"] = read("added", dtype, (added, columns))
    rank = entry.get("rank", 0)
    if rank:
        u = read("u", torch.float16, (rows, rank))
        common["low_rank"] = LowRank(u, read("v", torch.float16, (rank, columns)))
    if kind == "low_rank":
        return LowRankSite(**common)
    parts = enumerate(entry.get("parts", []))
    return QuantizedSite(
        **common,
        parts=tuple(_part(part, number, rows, columns, read) for number, part in parts),
        column_scales=read("column_scales", torch.float16, (columns,)) if entry.get("column_scales") else None,
        salient=_salient(rows, entry.get("salient", 0), read),
        sparse=_sparse(rows, entry.get("sparse"), read),
    )


def _part(part: dict[str, Any], number: int, out: int, columns: int, read: ReadTensor) -> Part:
    count, group_size = part.get("rows", out), part.get("group_size")
    groups = 1 if group_size is None else -(-columns // group_size)
    codes = read(f"codes.{number}", torch.int32, (-1,))
    scales = read(f"scales.{number}", torch.float16, (groups, count))
    rows = read(f"rows.{number}", torch.int32, (count,)) if "rows" in part else None
    return Part(part["bits"], part["zero"], codes, scales, group_size, rows)


def _salient(rows: int, count: int, read: ReadTensor) -> Salient | None:
    if not count:
        return None
    return Salient(read("salient_index", torch.int32, (count,)), read("salient", torch.float16, (rows, count)))


def _sparse(rows: int, entry: dict[str, int] | None, read: ReadTensor) -> Sparse | None:
    if entry is None:
        return None
    starts, count = read("sparse_starts", torch.int32, (rows + 1,)), (entry["entries"],)
    gaps = read("sparse_gaps", torch.uint8, count)
    return Sparse(starts, gaps, read("sparse_values", torch.float8_e5m2, count), entry["changed"])
