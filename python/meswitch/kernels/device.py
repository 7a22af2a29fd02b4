"""Deltas in the memory of a GPU: their tensors, and tables of them by slot.

delta in host memory ── checked ── page-locked memory, a few MB at a time ── a stream of its own ──> device memory
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from meswitch import _native
from meswitch.errors import FormatError, UnsupportedModelError
from meswitch.kernels.products import native_matrix
from meswitch.kernels.rows import Rows
from meswitch.site import DeltaSite, QuantizedSite

_ALIGNMENT = 64  # of tensors, as in the file
_STAGED_BYTES = 8 << 20
_SLOT_BYTES = len(_native.cuda_slot(1, 0, [], 0, (0, 0, 0), (0, 0, 0), (0, 0, 0)))
_FIRST_ENTRIES = 16


class Uploads:
    """Copies to a device. On a GPU they run beside its other work, until `settle`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staged: list[tuple[Tensor, torch.cuda.Event]] = []  # page-locked memory, and when it may be used again
        self._turn = 0
        self._pending = False

    def settle(self) -> None:
        """Whatever runs on the current stream from now on comes after the copies until now."""
        if self._stream is not None and self._pending:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._pending = False

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copies bytes `uint8 [n]` of the host to as many of the device."""
        if self._stream is None:
            to.copy_(source)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))  # which may still use that memory
        self._pending = True
        with torch.cuda.stream(self._stream):
            for some_to, some in zip(to.split(_STAGED_BYTES), source.split(_STAGED_BYTES), strict=True):
                staged, event = self._next_staged()
                staged[: len(some)].copy_(some)
                some_to.copy_(staged[: len(some)], non_blocking=True)
                event.record(self._stream)

    def _next_staged(self) -> tuple[Tensor, torch.cuda.Event]:
        """Page-locked memory that no copy reads any more."""
        if not self._staged:
            self._staged = [
                (torch.empty(_STAGED_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(3)
            ]
        self._turn = (self._turn + 1) % len(self._staged)
        self._staged[self._turn][1].synchronize()
        return self._staged[self._turn]


class DeviceSite:
    """A site's tensors on a device, in one piece. `entry`: what a table has of it; `rank`: of its low-rank part."""

    def __init__(self, site: DeltaSite, uploads: Uploads) -> None:
        native_matrix(site)  # lengths and indices, which nothing checks on the device
        self._offsets: dict[int, int] = {}
        tensors = list(_tensors(site))
        size = 0
        for tensor in tensors:
            self._offsets[id(tensor)] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.memory = torch.empty(size, dtype=torch.uint8, device=uploads.device)
        self.rank = 0 if site.low_rank is None else site.low_rank.u.shape[1]
        self.entry = self._entry(site)  # which may be refused: before copies to memory that would then be given back
        for tensor in tensors:
            start = self._offsets[id(tensor)]
            uploads.copy(self.memory[start : start + tensor.nbytes], tensor.contiguous().view(torch.uint8).view(-1))

    def _address(self, tensor: Tensor | None) -> int:
        return 0 if tensor is None else self.memory.data_ptr() + self._offsets[id(tensor)]

    def _entry(self, site: DeltaSite) -> Tensor:
        parts, column_scales, salient, sparse = [], 0, (0, 0, 0), (0, 0, 0)
        at = self._address
        if isinstance(site, QuantizedSite):
            columns = max(site.in_features, 1)
            parts = [
                (p.bits, p.zero, p.group_size or columns, p.count, at(p.codes), at(p.scales), at(p.rows))
                for p in site.parts
            ]
            column_scales = at(site.column_scales)
            if site.salient is not None:
                salient = at(site.salient.index), at(site.salient.values), len(site.salient.index)
            if site.sparse is not None:
                sparse = at(site.sparse.starts), at(site.sparse.gaps), at(site.sparse.values)
        low_rank = (0, 0, 0) if site.low_rank is None else (at(site.low_rank.u), at(site.low_rank.v), self.rank)
        try:
            entry = _native.cuda_slot(site.in_features, site.exponent, parts, column_scales, salient, low_rank, sparse)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{site.name}: {error}", hint='kernels="torch" runs every delta on any device'
            ) from error
        return torch.frombuffer(bytearray(entry), dtype=torch.uint8)


class SlotTable:
    """The deltas of one weight `[out_features, in_features]` by slot, on a device.

    What kernels read changes place only when it grows. Slot s lies at s + 1: the first entry is empty for ever and
    stands for every slot beyond the table.
    """

    def __init__(self, out_features: int, in_features: int, uploads: Uploads) -> None:
        self.out_features, self.in_features = out_features, in_features
        self._uploads = uploads
        self._sites: dict[int, DeviceSite] = {}
        self._entries = torch.zeros(1, _SLOT_BYTES, dtype=torch.uint8, device=uploads.device)

    @property
    def occupied(self) -> bool:
        return bool(self._sites)

    @property
    def address(self) -> tuple[int, int]:
        """Of its entries, and the number of slots."""
        return self._entries.data_ptr(), len(self._entries) - 1

    @property
    def rank(self) -> int:
        """The highest of a low-rank part."""
        return max((site.rank for site in self._sites.values()), default=0)

    def has(self, slot: int) -> bool:
        return slot in self._sites

    def active(self, rows: Rows) -> bool:
        """Whether any token may have a delta here; certain only where the host knows the tokens' slots."""
        if not self._sites:
            return False
        return not rows.is_on_host or not self._sites.keys().isdisjoint(rows.tokens)

    def check(self, site: DeltaSite) -> None:
        """Raises `FormatError` for a delta of another shape."""
        if (site.out_features, site.in_features) != (self.out_features, self.in_features):
            raise FormatError(
                f"{site.name}: expected a delta [{self.out_features}, {self.in_features}], "
                f"found [{site.out_features}, {site.in_features}]"
            )

    def set(self, slot: int, site: DeviceSite | None) -> None:
        """Puts a delta into a slot, or empties it; it counts after `Uploads.settle`."""
        if self._sites.pop(slot, None) is not None:
            self._uploads.settle()  # copies to memory that is given back here
            self._entries[slot + 1].zero_()
        if site is None:
            return
        if slot + 1 >= len(self._entries):
            self._grow(slot + 2)
        self._uploads.copy(self._entries[slot + 1], site.entry)
        self._sites[slot] = site

    def _grow(self, entries: int) -> None:
        self._uploads.settle()
        grown = self._entries.new_zeros(max(entries, 2 * len(self._entries), _FIRST_ENTRIES), _SLOT_BYTES)
        grown[: len(self._entries)] = self._entries
        self._entries = grown


def _tensors(site: DeltaSite) -> Iterator[Tensor]:
    """All that a kernel reads of a site."""
    found: list[Tensor | None] = []
    if isinstance(site, QuantizedSite):
        for part in site.parts:
            found += part.codes, part.scales, part.rows
        found.append(site.column_scales)
        if site.salient is not None:
            found += site.salient.index, site.salient.values
        if site.sparse is not None:
            found += site.sparse.starts, site.sparse.gaps, site.sparse.values
    if site.low_rank is not None:
        found += site.low_rank.u, site.low_rank.v
    return (tensor for tensor in found if tensor is not None)
