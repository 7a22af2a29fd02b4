"""CUDA kernels on an NVIDIA GPU: what deltas of many experts add, for all tokens of a step in one launch.

    one expert has more than 16 tokens     base and delta merged, a tile at a time, and multiplied by torch (prefill)
    otherwise                              the base module as it is, or a packed one by the same kernels, then one
                                           launch for the deltas of all modules that take the same input

`docs/cuda.md` has the kernels. All launches go onto torch's current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meswitch import _native
from meswitch.kernels.device import DeviceSite, SlotTable, Uploads
from meswitch.kernels.groups import Groups
from meswitch.kernels.rows import Rows
from meswitch.kernels.shared_input import SharedInput
from meswitch.site import DeltaSite

MERGE_TOKENS = 17
"""From so many tokens of one expert on, its delta is unpacked; with fewer, its codes are read once for four tokens."""

_MOST_SITES = 4  # of a launch
_MOST_UNITS = 512  # groups times sites of a launch
_READY_BYTES = 64 << 20  # of activations as the kernels read them, at most
_TILE_WEIGHTS = 1 << 24  # unpacked at a time
_DTYPES = (torch.bfloat16, torch.float32)


class CudaKernels:
    """The backend for models on an NVIDIA GPU.

    `driver`: a library in place of the machine's driver, with kernels that run on tensors of the CPU.
    Raises `CudaUnavailableError` where there is no driver or the build has no kernels, and `BackendError` for what the
    driver refuses.
    """

    name, exact = "cuda", False

    def __init__(self, device: torch.device | str = "cuda", *, driver: Path | None = None) -> None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._native = _native.CudaKernels(device.index or 0, driver)
        self.uploads = Uploads(device)
        self.shared_input = SharedInput(_MOST_SITES)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._partial = torch.zeros(0, dtype=torch.uint8, device=device)
        self._one_slot = Groups.of_one_slot(0, device)
        self._last_site: tuple[DeltaSite, DeviceSite] | None = None

    def linear(
        self,
        module: nn.Module,
        forward: Callable[..., Tensor],
        out_features: int,
        in_features: int,
        *,
        many_rows: bool,
        packed: DeltaSite | None = None,
    ) -> CudaLinear:
        return CudaLinear(self, module, forward, out_features, in_features, packed, many_rows=many_rows)

    def embedding(self, rows: int, width: int, packed: DeltaSite | None = None) -> CudaEmbedding:
        return CudaEmbedding(self, rows, width, packed)

    def settle(self) -> None:
        self.uploads.settle()
        self._last_site = None

    def table(self, rows: int, columns: int, only: DeltaSite | None = None) -> SlotTable:
        """A table of deltas, perhaps with one in slot 0."""
        table = SlotTable(rows, columns, self.uploads)
        if only is not None:
            self.put(table, 0, only)
            self.settle()
        return table

    def put(self, table: SlotTable, slot: int, site: DeltaSite | None) -> None:
        """Puts a delta into a table, or empties a slot. One that goes into several is uploaded once."""
        if site is None:
            table.set(slot, None)
            return
        table.check(site)
        if self._last_site is None or self._last_site[0] is not site:
            self._last_site = site, DeviceSite(site, self.uploads)
        table.set(slot, self._last_site[1])

    def add_products(self, x: Tensor, products: Sequence[tuple[Tensor, SlotTable]], groups: Groups) -> None:
        """`y[t] += Δ̂ · x[t]` in place, for tables of deltas and their `y [T, rows]`; `x [T, columns]`, as of y."""
        if x.dtype not in _DTYPES:
            wide = [torch.zeros_like(y, dtype=torch.float32) for y, _ in products]
            self.add_products(x.float(), [(own, table) for own, (_, table) in zip(wide, products, strict=True)], groups)
            for own, (y, _) in zip(wide, products, strict=True):
                y += own.to(y.dtype)
            return
        x = x if x.stride(-1) == 1 else x.contiguous()
        columns, rows = x.shape[1], [table.out_features for _, table in products]
        sites = [(table.address, y.data_ptr(), y.stride(0), table.out_features) for y, table in products]
        rank = max(table.rank for _, table in products)
        for some, count in groups.launches(_most_groups(len(products), columns)):
            scratch, partial = self._workspace(rows, columns, rank, len(some))
            addresses = some.data_ptr(), count.data_ptr(), groups.order.data_ptr(), len(some)
            self._native.linear(
                self._stream(),
                x.dtype == torch.bfloat16,
                sites,
                (x.data_ptr(), x.stride(0)),
                columns,
                rank,
                addresses,
                scratch,
                partial,
            )

    def add_rows(self, y: Tensor, table: SlotTable, slots: Tensor | int, ids: Tensor | int) -> None:
        """`y[i] += Δ̂[ids[i], :]` in place, `y [n, columns]` in bfloat16 or float32.

        `slots int32 [n]` and `ids int64 [n]`; numbers: one slot for all, and rows from that one on. What has no slot,
        or no such row, is left alone.
        """
        self._native.rows(
            self._stream(),
            y.dtype == torch.bfloat16,
            table.address,
            (0, slots) if isinstance(slots, int) else (slots.data_ptr(), 0),
            (0, ids) if isinstance(ids, int) else (ids.data_ptr(), 0),
            (y.data_ptr(), y.stride(0)),
            len(y),
            (table.out_features, table.in_features),
        )

    def one_slot(self, tokens: int) -> Groups:
        """Groups of as many tokens of slot 0."""
        if len(self._one_slot.order) != tokens:
            self._one_slot = Groups.of_one_slot(tokens, self.device)
        return self._one_slot

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def _workspace(self, rows: list[int], columns: int, rank: int, groups: int) -> tuple[int, int]:
        """Addresses of memory for one launch; those of one stream share it."""
        scratch, partial = _native.CudaKernels.workspace(rows, columns, rank, groups)
        if self._scratch.nbytes < scratch:
            self._scratch = torch.empty(scratch, dtype=torch.uint8, device=self.device)
        if self._partial.nbytes < partial:
            self._partial = torch.zeros(partial, dtype=torch.uint8, device=self.device)
        return self._scratch.data_ptr(), self._partial.data_ptr()


class CudaLinear:
    """A linear module of the base with the deltas of its weight, and the weight itself where it is packed."""

    def __init__(
        self,
        kernels: CudaKernels,
        module: nn.Module,
        forward: Callable[..., Tensor],
        out_features: int,
        in_features: int,
        packed: DeltaSite | None,
        *,
        many_rows: bool,
    ) -> None:
        self.out_features, self.in_features = out_features, in_features
        self._kernels, self._module, self._forward = kernels, module, forward
        self._deltas = kernels.table(out_features, in_features)
        self._packed = None if packed is None else kernels.table(out_features, in_features, packed)
        plain = type(module) is nn.Linear and "forward" not in module.__dict__
        self._merges = many_rows and (plain or packed is not None)
        self.followers: list[CudaLinear] = []
        self.ready: tuple[Rows, Tensor, Tensor] | None = None

    @property
    def occupied(self) -> bool:
        return self._deltas.occupied

    def set(self, slot: int, site: DeltaSite | None) -> None:
        self._kernels.put(self._deltas, slot, site)

    def __call__(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        if self._deltas.active(rows) and (merged := self._slots_to_merge(rows)):
            return self._merged_product(x, rows, merged)
        if args or kwargs:
            y = self._forward(x, *args, **kwargs)
            self.add(y.view(-1, self.out_features), x.reshape(-1, self.in_features), rows)
            return y
        return self._kernels.shared_input.product(self, x, rows, lambda linears: _products(linears, x, rows))

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        if self._deltas.active(rows):
            self._kernels.add_products(x, [(y, self._deltas)], rows.launch_groups)

    def base_product(self, x: Tensor) -> Tensor:
        """What the base has of `x [T, in_features]`, but for a packed weight and few tokens."""
        if self._packed is None:
            return self._forward(x)
        if len(x) >= MERGE_TOKENS:
            return self._whole_product(x, None)
        bias = self._bias
        y = x.new_zeros(len(x), self.out_features)
        return y if bias is None else y + bias

    @property
    def _bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self._module, "bias", None)
        return bias

    def _slots_to_merge(self, rows: Rows) -> list[int]:
        """The slots with so many tokens that base and delta are merged for them."""
        if not self._merges or not rows.is_on_host or rows.most_tokens < MERGE_TOKENS:
            return []
        return [slot for slot, own in rows.tokens.items() if len(own) >= MERGE_TOKENS and self._deltas.has(slot)]

    def _merged_product(self, x: Tensor, rows: Rows, slots: list[int]) -> Tensor:
        """All tokens: those of `slots` by one merged product each, the others by the base and their deltas."""
        flat = x.reshape(-1, self.in_features)
        if rows.only_slot is not None:
            y = self._whole_product(flat, rows.only_slot)
        else:
            y = flat.new_empty(len(flat), self.out_features)
            for slot in slots:
                index = rows.groups[slot]
                y[index] = self._whole_product(flat[index], slot)
            index, others = rows.without(slots)
            if len(others):
                y[index] = _products([self], flat[index], others)[0]
        return y.view(*x.shape[:-1], self.out_features)

    def _whole_product(self, x: Tensor, slot: int | None) -> Tensor:
        """`x [T, in_features]` times the base's weight with the delta of a slot, a tile at a time."""
        y = x.new_empty(len(x), self.out_features)
        bias = self._bias
        for start, stop in _tiles(self.out_features, self.in_features):
            tile = self._tile(start, stop, x.dtype if x.dtype in _DTYPES else torch.float32)
            if slot is not None:
                self._kernels.add_rows(tile, self._deltas, slot, start)
            own_bias = None if bias is None else bias[start:stop].to(x.dtype)
            y[:, start:stop] = F.linear(x, tile.to(x.dtype), own_bias)
        return y

    def _tile(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of the base's weight, to be changed."""
        if self._packed is not None:
            tile = torch.zeros(stop - start, self.in_features, dtype=dtype, device=self._kernels.device)
            self._kernels.add_rows(tile, self._packed, 0, start)
            return tile
        weight: Tensor = self._module.weight  # type: ignore[assignment]
        return weight[start:stop].to(dtype, copy=True)


class CudaEmbedding:
    """The deltas of an embedding table, and its own rows where it is packed."""

    def __init__(self, kernels: CudaKernels, rows: int, width: int, packed: DeltaSite | None) -> None:
        self._kernels = kernels
        self._deltas = kernels.table(rows, width)
        self._packed = None if packed is None else kernels.table(rows, width, packed)

    @property
    def occupied(self) -> bool:
        return self._deltas.occupied

    def set(self, slot: int, site: DeltaSite | None) -> None:
        self._kernels.put(self._deltas, slot, site)

    def add(self, y: Tensor, ids: Tensor, rows: Rows) -> None:
        if not self._deltas.active(rows):
            return
        wide = y if y.dtype in _DTYPES else torch.zeros_like(y, dtype=torch.float32)
        self._kernels.add_rows(wide, self._deltas, rows.slot_index, ids)
        if wide is not y:
            y += wide.to(y.dtype)

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        assert self._packed is not None
        wide = dtype if dtype in _DTYPES else torch.float32
        y = torch.zeros(len(ids), self._packed.in_features, dtype=wide, device=ids.device)
        self._kernels.add_rows(y, self._packed, 0, ids)
        return y.to(dtype)


def _products(linears: Sequence[CudaLinear], x: Tensor, rows: Rows) -> list[Tensor]:
    """The products of modules with the same input, each token's delta added."""
    kernels, flat = linears[0]._kernels, x.reshape(-1, linears[0].in_features)
    ys = [linear.base_product(flat) for linear in linears]
    pairs = list(zip(ys, linears, strict=True))
    if len(flat) < MERGE_TOKENS and (packed := [(y, own._packed) for y, own in pairs if own._packed is not None]):
        kernels.add_products(flat, packed, kernels.one_slot(len(flat)))
    if active := [(y, own._deltas) for y, own in pairs if own._deltas.active(rows)]:
        kernels.add_products(flat, active, rows.launch_groups)
    return [y.view(*x.shape[:-1], own.out_features) for y, own in pairs]


def _most_groups(sites: int, columns: int) -> int:
    """The most groups of a launch."""
    scratch, _ = _native.CudaKernels.workspace([1], columns, 0, 1)
    return max(1, min(_MOST_UNITS, _READY_BYTES // scratch) // sites)


def _tiles(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Where each tile of rows begins and ends."""
    step = max(1, _TILE_WEIGHTS // max(columns, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
