"""The scales of one site as things that learn: stored value · exp(moved), with the codes fixed.

A `Learner` holds what moves, for the whole site; a `Rows` rebuilds some rows of it, or all, and keeps their codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from meswitch import reference
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import DeltaSite, Part, QuantizedSite, ReplacedSite, SharedSite, Site, from_matrix

_PIECE = 2**24  # weights rebuilt at a time where not all are needed at once
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16


class Learner:
    """The scales of one site: what is stored, by role, and how far (in logarithms) each has moved."""

    def __init__(self, site: DeltaSite) -> None:
        self.site = site
        self.parts: tuple[Part, ...] = ()
        self.stored: dict[str, Tensor] = {}
        if isinstance(site, QuantizedSite):
            self.parts = site.parts
            self.stored |= {f"scales.{number}": part.scales.float() for number, part in enumerate(site.parts)}
            if site.column_scales is not None:
                self.stored["column_scales"] = site.column_scales.float()
        if site.low_rank is not None:
            self.stored["u"] = site.low_rank.u.float()
        self.moved = {role: nn.Parameter(torch.zeros_like(value)) for role, value in self.stored.items()}

    @property
    def has_codes(self) -> bool:
        """Whether there are scales of codes to learn."""
        return bool(self.parts)

    def rounded(self, role: str) -> Tensor:
        """`float16` in units of 2**exponent, what was not zero kept off zero and off infinity."""
        value = self.stored[role] * self.moved[role].detach().exp()
        size = value.abs().clamp(_SMALLEST, _LARGEST)
        return torch.where(value == 0, value, size.copysign(value)).half()

    def value(self, role: str, rounded: bool) -> Tensor:
        """`float32`, differentiable by `moved` unless `rounded`."""
        return self.rounded(role).float() if rounded else self.stored[role] * self.moved[role].exp()

    def tensors(self) -> dict[str, Tensor]:
        """The scales as they are to be stored, by `SITE/ROLE`."""
        return {f"{self.site.name}/{role}": self.rounded(role) for role in self.stored}

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Starts again from what `tensors` gave."""
        for role, move in self.moved.items():
            self.stored[role] = tensors[f"{self.site.name}/{role}"].float()
            move.zero_()


class Rows:
    """Some rows of a parameter, given by rising numbers `int64 [n]`, or all of them: their codes, and Δ̂ rebuilt."""

    def __init__(self, learner: Learner, wanted: Tensor | None = None) -> None:
        self.learner, site = learner, learner.site
        if wanted is None:
            wanted = torch.arange(site.out_features + site.added_rows)
        self._count, self._known = len(wanted), wanted[wanted < site.out_features]
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # where they lie in the part, and here; their codes
        for part in learner.parts:
            own = reference.part_rows(part, site.out_features)
            there = torch.isin(own, self._known).nonzero()[:, 0]
            codes = reference.unpack(part.codes, part.bits, len(part.scales), site.in_features, there)
            self._parts.append((there, torch.searchsorted(self._known, own[there]), codes))

    def delta(self, rounded: bool) -> Tensor:
        """Δ̂ as `float32 [n, in_features]`; zeros for rows of a grown vocabulary."""
        learner, site = self.learner, self.learner.site
        unit, whole = 2.0**site.exponent, "column_scales" not in learner.stored
        columns = torch.ones(site.in_features) if whole else learner.value("column_scales", rounded)
        delta = torch.zeros(self._count, site.in_features)
        for at, (part, (there, here, codes)) in enumerate(zip(learner.parts, self._parts, strict=True)):
            scales = learner.value(f"scales.{at}", rounded) * unit
            scales = scales if len(there) == len(scales) else scales[there]
            if scales.shape[1] > 1:
                scales = reference.expand_scales(scales, part.group_size, site.in_features)
            piece = _Levels.apply(codes, part.zero, scales, columns)
            delta = piece if len(here) == self._count else delta.index_add(0, here, piece)
        if site.low_rank is not None:
            u = learner.value("u", rounded)[self._known] * unit
            delta = delta + self._padded(u) @ site.low_rank.v.float()
        if isinstance(site, QuantizedSite) and site.salient is not None:
            salient = site.salient.values[self._known].float() * unit
            delta = delta.index_add(1, site.salient.index.long(), self._padded(salient))
        return delta

    def _padded(self, rows: Tensor) -> Tensor:
        missing = self._count - len(rows)
        return rows if not missing else torch.cat([rows, torch.zeros(missing, rows.shape[1])])


class Weight:
    """A site's parameter of the expert in float32, or some rows of it, built anew whenever asked.

    What the delta is added to is read from the base each time, unless `keep` says to hold it.
    """

    def __init__(
        self, site: Site, base: Checkpoint, learner: Learner | None, wanted: Tensor | None = None, *, keep: bool = False
    ) -> None:
        self._site, self._base, self._wanted = site, base, wanted
        self._rows = None if learner is None else Rows(learner, wanted)
        self._kept = self._ground() if keep else None

    @property
    def ground(self) -> Tensor:
        """What the delta is added to: the base's parameter, with the rows of a grown vocabulary after it."""
        return self._ground() if self._kept is None else self._kept

    def __call__(self, rounded: bool) -> Tensor:
        """Differentiable by what the learner moves, unless `rounded`: then with the scales as stored."""
        ground = self.ground
        if self._rows is None:
            return ground
        delta = self._rows.delta(rounded)
        return ground + from_matrix(delta, ground.shape, transposed=self._site.transposed)

    def _ground(self) -> Tensor:
        site, wanted = self._site, self._wanted
        start = site.value if isinstance(site, ReplacedSite) else self._base.tensor(site.name)
        known = site.base_rows
        old = slice(known) if wanted is None else wanted[wanted < known]
        # A copy: what is mapped must not be written to.
        rows = start[old].to(torch.float32, copy=True)
        if isinstance(site, SharedSite | ReplacedSite) or site.added is None:
            return rows
        new = slice(None) if wanted is None else wanted[wanted >= known] - known
        return torch.cat([rows, site.added[new].float()])

    def misses(self, finetune: Tensor) -> tuple[float, float]:
        """‖Δ‖² and ‖Δ − Δ̂‖² with the scales as stored, of these rows of the fine-tune's parameter."""
        ground, made = self.ground, self(True)
        wanted = (finetune if self._wanted is None else finetune[self._wanted]).float()
        return float((wanted - ground).square().sum()), float((wanted - made).square().sum())


def learners(sites: Iterable[Site]) -> dict[str, Learner]:
    """A learner for each of the sites that has a delta, by name."""
    return {site.name: Learner(site) for site in sites if isinstance(site, DeltaSite)}


def relative_error(learner: Learner, base: Checkpoint, finetune: Checkpoint) -> float:
    """‖Δ − Δ̂‖ / ‖Δ‖ with the scales as stored, a few rows at a time."""
    site, target = learner.site, finetune.tensor(learner.site.name)
    count = max(1, _PIECE // site.in_features)
    whole = site.transposed or len(site.shape) != 2
    pieces = [None] if whole else torch.arange(site.out_features).split(count)
    misses = [Weight(site, base, learner, piece).misses(target) for piece in pieces]
    size, missed = (math.sqrt(sum(column)) for column in zip(*misses, strict=True))
    return missed / size if size else 0.0


class _Levels(torch.autograd.Function):
    """`(codes − zero) · rows · columns`, keeping bytes alone for the way back.

    `codes uint8 [n, in]`, `rows [n, 1]` or `[n, in]`, `columns [in]`.
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, zero: float, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(codes, rows, columns)
        ctx.zero = zero
        return (codes - zero).mul_(rows).mul_(columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor]:
        codes, rows, columns = ctx.saved_tensors
        product = (codes - ctx.zero).mul_(gradients[0])
        if rows.shape[1] == 1:
            return None, None, (product @ columns)[:, None], rows[:, 0] @ product
        return None, None, product * columns, (product * rows).sum(0)
