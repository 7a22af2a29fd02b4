"""The CUDA kernels, compiled for this machine's processor, and their structures: what tests launch without a GPU.

`cuda/include/delta.cuh` says what the fields mean. Tensors are the process's own memory.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from meswitch.site import DeltaSite, Part, QuantizedSite

CUDA = Path(__file__).parents[1] / "cuda"
KERNELS = ("prepare", "multiply", "finish", "rows")
MOST_PARTS, MOST_SITES, MOST_TOKENS, WIDTHS, SLICE = 5, 4, 4, 4, 2048


class PartStruct(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("codes", "scales", "rows")],
        *[(name, c_int32) for name in ("count", "bits", "twice_zero", "group_size")],
    ]


class SlotStruct(ctypes.Structure):
    _fields_ = [
        ("parts", PartStruct * MOST_PARTS),
        *[(name, c_void_p) for name in "column_scales salient_index salient u v starts gaps values".split()],
        ("unit", c_float),
        *[(name, c_int32) for name in ("part_count", "salient_count", "rank")],
    ]


class GroupStruct(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("slot", "first", "count")]


class SiteStruct(ctypes.Structure):
    _fields_ = [
        ("slots", POINTER(SlotStruct)),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("rows", c_int32),
        ("slot_count", c_int32),
    ]


class LaunchStruct(ctypes.Structure):
    _fields_ = [
        ("sites", SiteStruct * MOST_SITES),
        *[(name, c_void_p) for name in ("groups", "group_count", "order", "x")],
        ("x_stride", c_int64),
        *[(name, c_void_p) for name in ("ready", "steps", "vx", "partial")],
        *[(name, c_int32) for name in "columns site_count splits most_rows most_rank reserved".split()],
    ]


class RowsLaunchStruct(ctypes.Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("slots", "slot_of", "ids", "y")],
        ("y_stride", c_int64),
        *[(name, c_int32) for name in "count rows columns slot first slot_count".split()],
    ]


def build(folder: Path, source: Path = CUDA, flags: Sequence[str] = ("-O2",)) -> Path:
    """Compiles kernels and the driver without a GPU to `folder/libcuda.so.1`. `CXX` may name another compiler."""
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    sources = [*(source / "kernels" / f"{name}.cu" for name in KERNELS), source / "host" / "driver.cpp"]
    objects = [folder / f"{path.stem}.o" for path in sources]
    with ThreadPoolExecutor() as pool:
        for done in pool.map(
            lambda pair: subprocess.run(
                [*compiler, "-Wno-unknown-pragmas", *flags, "-x", "c++", "-c", pair[0], "-o", pair[1]],
                capture_output=True,
                text=True,
            ),
            zip(sources, objects, strict=True),
        ):
            assert done.returncode == 0, done.stderr
    library = folder / "libcuda.so.1"
    subprocess.run([*compiler, *flags, "-shared", "-o", library, *objects], check=True)
    return library


def part_struct(part: Part, columns: int, rows: int) -> PartStruct:
    return PartStruct(
        part.codes.data_ptr(),
        part.scales.data_ptr(),
        None if part.rows is None else part.rows.data_ptr(),
        rows if part.rows is None else len(part.rows),
        part.bits,
        int(2 * part.zero),
        min(part.group_size or columns, columns),
    )


def slot_struct(site: DeltaSite) -> SlotStruct:
    """Pointers to a site's tensors, which must outlive it."""
    slot = SlotStruct(unit=2.0**site.exponent)
    if site.low_rank is not None:
        slot.u, slot.v = site.low_rank.u.data_ptr(), site.low_rank.v.data_ptr()
        slot.rank = site.low_rank.u.shape[1]
    if isinstance(site, QuantizedSite):
        slot.part_count = len(site.parts)
        for at, part in enumerate(site.parts):
            slot.parts[at] = part_struct(part, site.in_features, site.out_features)
        if site.column_scales is not None:
            slot.column_scales = site.column_scales.data_ptr()
        if site.salient is not None:
            slot.salient_index, slot.salient = site.salient.index.data_ptr(), site.salient.values.data_ptr()
            slot.salient_count = len(site.salient.index)
        if site.sparse is not None:
            slot.starts, slot.gaps = site.sparse.starts.data_ptr(), site.sparse.gaps.data_ptr()
            slot.values = site.sparse.values.data_ptr()
    return slot


def slot_table(by_slot: Mapping[int, DeltaSite]) -> ctypes.Array[SlotStruct]:
    """The sites by slot, after an empty one; tokens may have slots beyond them."""
    table = (SlotStruct * (max(by_slot, default=-1) + 2))()
    for slot, site in by_slot.items():
        table[slot + 1] = slot_struct(site)
    return table


def groups_of(slots: Sequence[int]) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Groups `(slot, first, count)` of at most four tokens of one slot, and their tokens. −1 is in no group."""
    groups, order = [], []
    for slot in sorted(set(slots) - {-1}):
        tokens = [token for token, own in enumerate(slots) if own == slot]
        for at in range(0, len(tokens), MOST_TOKENS):
            some = tokens[at : at + MOST_TOKENS]
            groups.append((slot, len(order), len(some)))
            order += some
    return groups, order


class HostKernels:
    """The kernels of a library that `build` made."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def delta_linear(
        self,
        ys: Sequence[Tensor],
        x: Tensor,
        slots: Sequence[int],
        sites: Sequence[Mapping[int, DeltaSite]],
        *,
        splits: int = 1,
        blocks: int = 3,
        order: int = 0,
    ) -> None:
        """`y[t] += Δ̂ · x[t]` in place, for weights with one input: a `y [T, rows]` and the sites by slot of each.

        `x [T, columns]` and `y` are float32 or bfloat16 with rows of any stride. `order`: as `host::launch` has it.
        """
        columns, tables = x.shape[1], [slot_table(by_slot) for by_slot in sites]
        groups, tokens = groups_of(slots)
        group_structs = (GroupStruct * len(groups))(*groups)
        group_count, token_array = c_int32(len(groups)), (c_int32 * len(tokens))(*tokens)
        units, slices, rows = len(groups) * len(sites), -(-columns // SLICE), max(y.shape[1] for y in ys)
        rank = max((slot.rank for table in tables for slot in table), default=0)
        ready = torch.empty(units * WIDTHS * -(-columns // 256) * 256 * 2 * MOST_TOKENS, dtype=torch.uint8)
        steps = torch.full((units * WIDTHS * slices * MOST_TOKENS,), torch.nan)
        vx = torch.full((units * MOST_TOKENS * rank,), torch.nan)
        partial = torch.zeros(units * splits * MOST_TOKENS * rows)
        launch = LaunchStruct(
            groups=ctypes.addressof(group_structs),
            group_count=ctypes.addressof(group_count),
            order=ctypes.addressof(token_array),
            x=x.data_ptr(),
            x_stride=x.stride(0),
            ready=ready.data_ptr(),
            steps=steps.data_ptr(),
            vx=vx.data_ptr(),
            partial=partial.data_ptr(),
            columns=columns,
            site_count=len(sites),
            splits=splits,
            most_rows=rows,
            most_rank=rank,
        )
        for at, (table, y) in enumerate(zip(tables, ys, strict=True)):
            launch.sites[at] = SiteStruct(table, y.data_ptr(), y.stride(0), y.shape[1], len(table) - 1)
        kind = "bf16" if x.dtype == torch.bfloat16 else "f32"
        for name in (f"delta_prepare_{kind}", "delta_multiply", f"delta_finish_{kind}"):
            assert self._library.host_launch(name.encode(), blocks, order, ctypes.byref(launch)) == 0
        assert not partial.any(), "partial sums are zeros after a launch"

    def delta_rows(
        self,
        y: Tensor,
        ids: Sequence[int] | int,
        slots: Sequence[int] | int,
        sites: Mapping[int, DeltaSite],
        *,
        blocks: int = 3,
        order: int = 0,
    ) -> None:
        """`y[i] += Δ̂[ids[i], :]` of slot `slots[i]`, in place; numbers: rows from `ids` on, one slot for all.

        `y [n, columns]` is float32 or bfloat16 with rows of any stride.
        """
        table = slot_table(sites)
        rows, columns = next((site.out_features, site.in_features) for site in sites.values())
        id_array = None if isinstance(ids, int) else (c_int64 * len(ids))(*ids)
        slot_array = None if isinstance(slots, int) else (c_int32 * len(slots))(*slots)
        launch = RowsLaunchStruct(
            slots=ctypes.addressof(table),
            slot_of=None if slot_array is None else ctypes.addressof(slot_array),
            ids=None if id_array is None else ctypes.addressof(id_array),
            y=y.data_ptr(),
            y_stride=y.stride(0),
            count=len(y),
            rows=rows,
            columns=columns,
            slot=slots if isinstance(slots, int) else -1,
            first=ids if isinstance(ids, int) else 0,
            slot_count=len(table) - 1,
        )
        name = f"delta_rows_{'bf16' if y.dtype == torch.bfloat16 else 'f32'}"
        assert self._library.host_launch(name.encode(), blocks, order, ctypes.byref(launch)) == 0
