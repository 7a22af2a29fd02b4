"""Plain torch on any device: a tile of the delta is unpacked and multiplied. Right, not fast.

The arithmetic is the reference's on every device that torch has: sums of float32 products, added to the base module's
own output. Codes are copied to the device as they are packed and unpacked there, tile by tile, at every use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meswitch import reference
from meswitch.errors import FormatError
from meswitch.kernels import invariance
from meswitch.kernels.rows import Rows
from meswitch.site import DeltaSite, Part, QuantizedSite, Sparse

_TILE_WEIGHTS = 1 << 24  # unpacked at a time: 64 MiB in float32


class TorchKernels:
    """The backend for any device; `exact` makes no difference, since it always is."""

    name = "torch"

    def __init__(self, device: torch.device | str = "cpu", *, exact: bool = True) -> None:
        self.device, self.exact = torch.device(device), exact

    def linear(
        self,
        module: nn.Module,
        forward: Callable[..., Tensor],
        out_features: int,
        in_features: int,
        *,
        many_rows: bool,
        packed: DeltaSite | None = None,
    ) -> TorchLinear:
        if packed is not None:
            forward = PackedWeight(UnpackedRows(packed, self.device), module)
        return TorchLinear(self.device, forward, out_features, in_features)

    def embedding(self, rows: int, width: int, packed: DeltaSite | None = None) -> TorchEmbedding:
        return TorchEmbedding(self.device, rows, width, packed)

    def settle(self) -> None:
        pass  # a delta is there as soon as it is set


class _DeltaTable:
    """The deltas of one weight `[out_features, in_features]`, by slot."""

    def __init__(self, device: torch.device, out_features: int, in_features: int) -> None:
        self._device, self.out_features, self.in_features = device, out_features, in_features
        self._deltas: dict[int, UnpackedRows] = {}

    @property
    def occupied(self) -> bool:
        return bool(self._deltas)

    def set(self, slot: int, site: DeltaSite | None) -> None:
        self._deltas.pop(slot, None)
        if site is None:
            return
        if site.out_features > self.out_features or site.in_features != self.in_features:
            raise FormatError(
                f"{site.name}: expected a delta [{self.out_features}, {self.in_features}], "
                f"found [{site.out_features}, {site.in_features}]"
            )
        self._deltas[slot] = UnpackedRows(site, self._device)

    def _active(self, rows: Rows) -> Iterator[tuple[UnpackedRows, Tensor]]:
        """The delta and the tokens of every slot that has both."""
        return ((self._deltas[slot], index) for slot, index in rows.groups.items() if slot in self._deltas)


class TorchLinear(_DeltaTable):
    """A linear module of the base with the deltas of its weight."""

    def __init__(
        self, device: torch.device, forward: Callable[..., Tensor], out_features: int, in_features: int
    ) -> None:
        super().__init__(device, out_features, in_features)
        self._forward = forward

    def __call__(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        y = self._forward(x, *args, **kwargs)
        if self._deltas.keys().isdisjoint(rows.tokens):
            return y
        flat = y.reshape(-1, self.out_features)
        self.add(flat, x.reshape(-1, self.in_features), rows)
        return flat.view(y.shape)

    def add(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        for delta, index in self._active(rows):
            y[index, : delta.out_features] += delta.product(x[index]).to(y.dtype)


class PackedWeight:
    """The product of a linear `module` whose weight the base keeps packed."""

    def __init__(self, weight: UnpackedRows, module: nn.Module) -> None:
        self._weight, self._module = weight, module

    def __call__(self, x: Tensor) -> Tensor:
        y = self._weight.product(x.reshape(-1, x.shape[-1])).to(x.dtype).view(*x.shape[:-1], -1)
        bias: Tensor | None = getattr(self._module, "bias", None)
        return y if bias is None else y + bias


class TorchEmbedding(_DeltaTable):
    """The deltas of an embedding table, and its own rows where it is packed."""

    def __init__(self, device: torch.device, rows: int, width: int, packed: DeltaSite | None = None) -> None:
        super().__init__(device, rows, width)
        self._packed = None if packed is None else UnpackedRows(packed, device)

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        assert self._packed is not None
        return self._packed.rows(ids).to(dtype)

    def add(self, y: Tensor, ids: Tensor, rows: Rows) -> None:
        for delta, index in self._active(rows):
            own = ids[index]
            known = (own < delta.out_features)[:, None]
            found = delta.rows(own.clamp(max=max(delta.out_features - 1, 0)))
            y[index] += torch.where(known, found, 0.0).to(y.dtype)


class UnpackedRows:
    """Rows of Δ̂ of one site, unpacked on a device when asked for."""

    def __init__(self, site: DeltaSite, device: torch.device) -> None:
        self.out_features, self.in_features = site.out_features, site.in_features
        self._device, self._unit = device, 2.0**site.exponent
        self._parts: list[_PartRows] = []
        self._column_scales: Tensor | None = None
        self._salient: tuple[Tensor, Tensor] | None = None
        self._sparse: tuple[Tensor, Tensor, Tensor] | None = None
        if isinstance(site, QuantizedSite):
            self._parts = [_PartRows(part, site.out_features, site.in_features, device) for part in site.parts]
            if site.column_scales is not None:
                self._column_scales = site.column_scales.to(device).float()
            if site.salient is not None:
                self._salient = site.salient.index.long().to(device), site.salient.values.to(device)
            if site.sparse is not None:
                self._sparse = self._entries(site.sparse)
        self._low_rank = None
        if site.low_rank is not None:
            self._low_rank = site.low_rank.u.to(device), site.low_rank.v.to(device).float()

    def _entries(self, sparse: Sparse) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = reference.entries(sparse)
        values = sparse.values.float() * self._unit
        return rows.to(self._device), columns.to(self._device), values.to(self._device)

    def tiles(self) -> Iterator[Tensor]:
        """The numbers of all rows, `int64`, some at a time."""
        step = max(1, _TILE_WEIGHTS // max(self.in_features, 1))
        yield from torch.arange(self.out_features, device=self._device).split(step)

    def product(self, x: Tensor) -> Tensor:
        """`float32 [T, out_features]`: Δ̂ · x[t] of every row of `x [T, in_features]`."""
        x = x.float()
        return torch.cat([invariance.linear(x, self.rows(tile)) for tile in self.tiles()], dim=1)

    def rows(self, wanted: Tensor) -> Tensor:
        """`float32 [n, in_features]` of the rows `wanted int64 [n]`, in any order and any number of times."""
        delta = torch.zeros(len(wanted), self.in_features, device=self._device)
        for part in self._parts:
            part.add(delta, wanted, self._unit)
        if self._column_scales is not None:
            delta *= self._column_scales
        if self._low_rank is not None:
            delta += (self._low_rank[0][wanted].float() * self._unit) @ self._low_rank[1]
        if self._salient is not None:
            index, values = self._salient
            delta.index_add_(1, index, values[wanted].float() * self._unit)
        if self._sparse is not None and len(wanted):
            self._add_entries(delta, wanted)
        return delta

    def _add_entries(self, delta: Tensor, wanted: Tensor) -> None:
        assert self._sparse is not None
        rows, columns, values = self._sparse
        distinct, inverse = wanted.unique(return_inverse=True)
        place = torch.searchsorted(distinct, rows).clamp(max=len(distinct) - 1)
        own = distinct[place] == rows
        entries = torch.zeros(len(distinct), self.in_features, device=self._device)
        entries.index_put_((place[own], columns[own]), values[own], accumulate=True)
        delta += entries[inverse]


class _PartRows:
    """The rows of a site that share a bit width, packed on the device."""

    def __init__(self, part: Part, out_features: int, in_features: int, device: torch.device) -> None:
        self._bits, self._zero, self._columns = part.bits, part.zero, in_features
        self._count, self._group_size = part.count, part.group_size or max(in_features, 1)
        self._codes, self._scales = part.codes.view(torch.uint8).to(device), part.scales.T.to(device)
        self._place: Tensor | None = None  # where in the part each row of the site is; −1 elsewhere
        if part.rows is not None:
            place = torch.full((out_features,), -1, dtype=torch.int64)
            place[part.rows.long()] = torch.arange(self._count)
            self._place = place.to(device)

    def add(self, delta: Tensor, wanted: Tensor, unit: float) -> None:
        """Codes times row scales, put into the rows of `delta` that belong to this part."""
        if not self._count:
            return
        place = wanted if self._place is None else self._place[wanted]
        codes = self._unpack(place.clamp(min=0)).float()
        scales = self._scales[place.clamp(min=0)].float().repeat_interleave(self._group_size, dim=1)
        levels = scales[:, : self._columns] * unit * (codes - self._zero)
        delta.copy_(levels if self._place is None else torch.where(place[:, None] >= 0, levels, delta))

    def _unpack(self, place: Tensor) -> Tensor:
        """Codes `uint8 [n, columns]` of some rows of the part; `reference.unpack` says how they lie."""
        width, block = reference.row_bytes(self._bits, self._columns), reference.BLOCK_ROWS
        start = place // block * block
        size = (reference.padded_rows(self._count) - start).clamp(max=block)
        first = start * width + place - start
        steps = torch.arange(width, device=place.device)
        return reference.unpack_rows(self._codes[first[:, None] + size[:, None] * steps], self._bits, self._columns)
