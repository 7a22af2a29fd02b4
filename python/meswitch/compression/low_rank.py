"""Deltas as two thin factors: how they are stored, and what a truncated SVD of equal bytes would be.

Δ̂ [out, in] = 2^exponent · u [out, r] · v [r, in]        u, v float16
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.errors import ArchitectureError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import DeltaSite, LowRank, LowRankSite, to_matrix

_TOP = 8  # the power of two near which the largest entries of u and v are stored: far from both ends of float16
_POWER = 6  # power iterations of the SVD, and below its oversampling: within 0.5 % of the best even for pure noise


@dataclass(frozen=True)
class Factors:
    """`u float16 [out, r]` and `v float16 [r, in]`, their product in units of 2^exponent."""

    u: Tensor
    v: Tensor
    exponent: int = 0

    @classmethod
    def of(cls, u: Tensor, v: Tensor) -> Factors:
        """`u · v`, of finite float factors `[out, r]` and `[r, in]`, in 16 bits.

        Every component is balanced between its two sides, by powers of two alone: factors of 16 bits (an adapter's,
        say) stay exactly what they are. Components of zeros are left out.

        >>> u, v = torch.tensor([[2.0**-30], [2.0**-28]]), torch.tensor([[2.0**20, 0.0]])
        >>> found = Factors.of(u, v)
        >>> torch.equal(2.0**found.exponent * found.u.float() @ found.v.float(), u @ v)
        True
        """
        u, v = u.double(), v.double()
        left, right = _peaks(u, 0), _peaks(v, 1)
        there = left.isfinite() & right.isfinite()
        u, v, left, right = u[:, there], v[there], left[there], right[there]
        if not there.any():
            return cls(u.half(), v.half())
        strength = left + right
        shift = (_TOP + (strength - strength.max()) / 2 - right).round()
        u, v = u * (-shift).exp2(), v * shift.exp2()[:, None]
        exponent = int(_peaks(u.flatten(), 0).floor()) - _TOP
        return cls((u * 2.0**-exponent).half(), v.half(), exponent)

    @property
    def rank(self) -> int:
        return self.v.shape[0]

    @property
    def nbytes(self) -> int:
        return 2 * (self.u.numel() + self.v.numel())

    def relative_error(self, u: Tensor, v: Tensor) -> float:
        """‖u·v − this‖ / ‖u·v‖, without either product: ‖L·R‖² is the sum of LᵀL ∘ RRᵀ."""
        own = 2.0**self.exponent * self.u.double()
        missed = _norm(torch.cat([u.double(), own], 1), torch.cat([v.double(), -self.v.double()]))
        whole = _norm(u.double(), v.double())
        return missed / whole if whole else 0.0


def _peaks(matrix: Tensor, axis: int) -> Tensor:
    """log₂ of the largest magnitude along an axis; −∞ for zeros."""
    return matrix.abs().amax(axis).log2()


def _norm(left: Tensor, right: Tensor) -> float:
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def equal_rank(site: DeltaSite) -> int:
    """The largest rank whose 16-bit factors weigh no more than the site does, rows of a grown vocabulary aside."""
    added = 0 if site.added is None else site.added.nbytes
    rank = (site.nbytes - added) // (2 * max(site.out_features + site.in_features, 1))
    return min(rank, site.out_features, site.in_features)


def equal_bytes(site: DeltaSite, base: Checkpoint, finetune: Checkpoint) -> LowRankSite:
    """The site as a truncated SVD of fine-tune − base would have it, in no more bytes; everything else as it is.

    The randomized method of Halko, Martinsson and Tropp (arXiv 0909.4061, `torch.svd_lowrank`), from a fixed seed.
    Raises `ArchitectureError` where the fine-tune has another shape than the site.
    """
    found = finetune.shape(site.name)
    if found != site.shape:
        raise ArchitectureError(
            f"expected {site.name} of the fine-tune in the delta's shape {site.shape}, found {found}",
            hint="give the fine-tune that the delta was made of",
        )
    known, rank = site.out_features, equal_rank(site)
    ours, theirs = (
        to_matrix(checkpoint.tensor(site.name).float(), transposed=site.transposed)[:known]
        for checkpoint in (base, finetune)
    )
    u, s, v = _svd(theirs - ours, rank)
    root = s.sqrt()
    factors = Factors.of(u * root, root[:, None] * v.T)
    added = 0 if site.added is None else site.added.nbytes
    return LowRankSite(
        name=site.name,
        shape=site.shape,
        dtype=site.dtype,
        transposed=site.transposed,
        low_rank=LowRank(factors.u, factors.v),
        added=site.added,
        exponent=factors.exponent,
        nbytes=factors.nbytes + added,
    )


def _svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    if rank == 0:
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0), matrix.new_zeros(matrix.shape[1], 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(2 * rank + 16, *matrix.shape), _POWER)
    return u[:, :rank], s[:rank], v[:, :rank]
