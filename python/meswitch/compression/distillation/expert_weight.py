"""An expert's parameter in float32, rebuilt from base, codes and trainable scales; all rows of it, or some.

base rows ────────────────────────────────────────┐
codes, trainable scales ── `DeltaRows`: rows of Δ̂ ─┴── `ExpertWeight`
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from meswitch import reference
from meswitch.compression.distillation.scales import TrainableScales
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import QuantizedSite, ReplacedSite, SharedSite, Site, from_matrix

_PIECE_WEIGHTS = 2**24  # rebuilt at a time, where not all are needed at once: 64 MiB


class DeltaRows:
    """Rows of a site's Δ̂, with their codes unpacked to a byte each.

    `row_numbers int64 [n]`, rising; `None` for all rows. Rows of a grown vocabulary, beyond the matrix, are zeros.
    """

    def __init__(self, scales: TrainableScales, row_numbers: Tensor | None = None) -> None:
        self._scales, site = scales, scales.site
        if row_numbers is None:
            row_numbers = torch.arange(site.out_features + site.added_rows)
        self._count = len(row_numbers)
        self._base_rows = row_numbers[row_numbers < site.out_features]
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # rows' places in the part, places here, their codes
        for part in scales.parts:
            numbers = reference.part_rows(part, site.out_features)
            in_part = torch.isin(numbers, self._base_rows).nonzero()[:, 0]
            codes = reference.unpack(part.codes, part.bits, part.count, site.in_features, in_part)
            self._parts.append((in_part, torch.searchsorted(self._base_rows, numbers[in_part]), codes))

    def delta(self, *, rounded: bool) -> Tensor:
        """Δ̂ as `float32 [n, in_features]`, with the scales as stored if `rounded`, else differentiable by them."""
        scales, site = self._scales, self._scales.site
        unit = 2.0**site.exponent
        delta = self._codes_delta(unit, rounded=rounded)
        if site.low_rank is not None:
            u = scales.value("u", rounded=rounded)[self._base_rows] * unit
            delta = delta + self._with_added_rows(u) @ site.low_rank.v.float()
        if isinstance(site, QuantizedSite) and site.salient is not None:
            salient = site.salient.values[self._base_rows].float() * unit
            delta = delta.index_add(1, site.salient.index.long(), self._with_added_rows(salient))
        return delta

    def _codes_delta(self, unit: float, *, rounded: bool) -> Tensor:
        """What codes, row scales and column scales make up of Δ̂."""
        scales, columns = self._scales, self._scales.site.in_features
        has_column_scales = "column_scales" in scales.stored
        column_scales = scales.value("column_scales", rounded=rounded) if has_column_scales else torch.ones(columns)
        delta = torch.zeros(self._count, columns)
        for number, (part, (in_part, places, codes)) in enumerate(zip(scales.parts, self._parts, strict=True)):
            row_scales = scales.value(f"scales.{number}", rounded=rounded).T * unit
            row_scales = row_scales if len(in_part) == len(row_scales) else row_scales[in_part]
            if row_scales.shape[1] > 1:
                row_scales = reference.expand_scales(row_scales, part.group_size, columns)
            product = _ScaledCodes.apply(codes, part.zero, row_scales, column_scales)
            delta = product if len(places) == self._count else delta.index_add(0, places, product)
        return delta

    def _with_added_rows(self, rows: Tensor) -> Tensor:
        missing = self._count - len(rows)
        return rows if not missing else torch.cat([rows, torch.zeros(missing, rows.shape[1])])


class ExpertWeight:
    """An expert's parameter in float32, in its own shape, or some rows of it; rebuilt at every call.

    `scales`: the site's trainable scales, `None` for a site without a delta. `row_numbers int64 [n]`, rising: entries
    of the first axis, `None` for all. The base's parameter is read from its file at every call, unless `keep_base`.
    """

    def __init__(
        self,
        site: Site,
        base: Checkpoint,
        scales: TrainableScales | None,
        row_numbers: Tensor | None = None,
        *,
        keep_base: bool = False,
    ) -> None:
        self._site, self._checkpoint, self._row_numbers = site, base, row_numbers
        self._delta_rows = None if scales is None else DeltaRows(scales, row_numbers)
        self._kept_base = self._read_base() if keep_base else None

    @property
    def base(self) -> Tensor:
        """What the delta is added to: the base's parameter, then the stored rows of a grown vocabulary."""
        return self._read_base() if self._kept_base is None else self._kept_base

    def keep_base(self, base: Tensor) -> None:
        """Takes `base` for what is in the file, from now on."""
        self._kept_base = base

    def __call__(self, *, rounded: bool) -> Tensor:
        """The parameter: with the scales as stored if `rounded`, else differentiable by their shifts."""
        base = self.base
        if self._delta_rows is None:
            return base
        return base + from_matrix(self._delta_rows.delta(rounded=rounded), base.shape, transposed=self._site.transposed)

    def squared_errors(self, finetune: Tensor) -> tuple[float, float]:
        """‖Δ‖² and ‖Δ − Δ̂‖² over these rows, with the scales as stored; `finetune` is the fine-tune's parameter."""
        base, rebuilt = self.base, self(rounded=True)
        target = (finetune if self._row_numbers is None else finetune[self._row_numbers]).float()
        return float((target - base).square().sum()), float((target - rebuilt).square().sum())

    def _read_base(self) -> Tensor:
        site, numbers = self._site, self._row_numbers
        parameter = site.value if isinstance(site, ReplacedSite) else self._checkpoint.tensor(site.name)
        in_base = slice(site.base_rows) if numbers is None else numbers[numbers < site.base_rows]
        # A copy: the mapped file must not be written to.
        rows = parameter[in_base].to(torch.float32, copy=True)
        if isinstance(site, SharedSite | ReplacedSite) or site.added is None:
            return rows
        in_added = slice(None) if numbers is None else numbers[numbers >= site.base_rows] - site.base_rows
        return torch.cat([rows, site.added[in_added].float()])


class StackedWeight:
    """A stack of MoE experts in float32, rebuilt at every call from the weights that lie one below another in it.

    `base`: what deltas are added to, of which each piece keeps its own rows.
    """

    def __init__(self, pieces: Sequence[ExpertWeight], shape: Sequence[int]) -> None:
        self._pieces = list(pieces)
        bases = [piece.base for piece in pieces]
        self.base = torch.cat(bases).view(*shape)
        for piece, rows in zip(pieces, self.base.flatten(0, 1).split([len(base) for base in bases]), strict=True):
            piece.keep_base(rows)

    def __call__(self, *, rounded: bool) -> Tensor:
        """As `ExpertWeight` does."""
        return torch.cat([piece(rounded=rounded) for piece in self._pieces]).view(self.base.shape)


Weight: TypeAlias = ExpertWeight | StackedWeight


def relative_error(scales: TrainableScales, base: Checkpoint, finetune: Checkpoint) -> float:
    """‖Δ − Δ̂‖ / ‖Δ‖ with the scales as stored, a few rows at a time."""
    site, target = scales.site, finetune.tensor(scales.site.name)
    count = max(1, _PIECE_WEIGHTS // site.in_features)
    in_one = site.transposed or len(site.shape) != 2
    pieces = [None] if in_one else torch.arange(site.out_features).split(count)
    squares = [ExpertWeight(site, base, scales, piece).squared_errors(target) for piece in pieces]
    size, missed = (math.sqrt(sum(column)) for column in zip(*squares, strict=True))
    return missed / size if size else 0.0


class _ScaledCodes(torch.autograd.Function):
    """`(codes − zero) · row_scales · column_scales`, which saves nothing but the codes' bytes and the scales.

    `codes uint8 [n, in]`, `row_scales [n, 1]` or `[n, in]`, `column_scales [in]`.
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, zero: float, row_scales: Tensor, column_scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, row_scales, column_scales)
        ctx.zero = zero
        return (codes - zero).mul_(row_scales).mul_(column_scales)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor]:
        codes, row_scales, column_scales = ctx.saved_tensors
        product = (codes - ctx.zero).mul_(gradients[0])
        if row_scales.shape[1] == 1:
            return None, None, (product @ column_scales)[:, None], row_scales[:, 0] @ product
        return None, None, product * column_scales, (product * row_scales).sum(0)
