"""Deltas as two thin factors: how they are stored, and the truncated SVD that takes as many bytes as a site.

Δ̂ [out, in] = 2^exponent · u [out, r] · v [r, in]        u, v float16
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.errors import ArchitectureError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import DeltaSite, LowRank, LowRankSite, to_matrix

_PEAK = 8  # log₂ of about the largest stored entry of u and v: far from both ends of float16's range
# Of the randomized SVD, whose oversampling is below: within 0.5 % of the best approximation even for pure noise.
_POWER_ITERATIONS = 6


@dataclass(frozen=True)
class Factors:
    """`u float16 [out, r]` and `v float16 [r, in]`, their product in units of 2^exponent."""

    u: Tensor
    v: Tensor
    exponent: int = 0

    @classmethod
    def from_product(cls, u: Tensor, v: Tensor) -> Factors:
        """The product `u · v` of finite float factors `[out, r]` and `[r, in]`, stored in 16 bits.

        Both sides of every component are scaled to the same size, by powers of two only, so that 16-bit factors (an
        adapter's, say) stay exact. Components that are 0 are left out.

        >>> u, v = torch.tensor([[2.0**-30], [2.0**-28]]), torch.tensor([[2.0**20, 0.0]])
        >>> stored = Factors.from_product(u, v)
        >>> torch.equal(2.0**stored.exponent * stored.u.float() @ stored.v.float(), u @ v)
        True
        """
        u, v = u.double(), v.double()
        u_peaks, v_peaks = _log_peaks(u, 0), _log_peaks(v, 1)
        nonzero = u_peaks.isfinite() & v_peaks.isfinite()
        u, v, u_peaks, v_peaks = u[:, nonzero], v[nonzero], u_peaks[nonzero], v_peaks[nonzero]
        if not nonzero.any():
            return cls(u.half(), v.half())
        product_peaks = u_peaks + v_peaks
        shift = (_PEAK + (product_peaks - product_peaks.max()) / 2 - v_peaks).round()
        u, v = u * (-shift).exp2(), v * shift.exp2()[:, None]
        exponent = int(_log_peaks(u.flatten(), 0).floor()) - _PEAK
        return cls((u * 2.0**-exponent).half(), v.half(), exponent)

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.v.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return 2 * (self.u.numel() + self.v.numel())

    def relative_error(self, u: Tensor, v: Tensor) -> float:
        """‖u·v − this‖ / ‖u·v‖, computed without either product: ‖L·R‖² is the sum of LᵀL ∘ RRᵀ."""
        stored_u = 2.0**self.exponent * self.u.double()
        error = _product_norm(torch.cat([u.double(), stored_u], 1), torch.cat([v.double(), -self.v.double()]))
        norm = _product_norm(u.double(), v.double())
        return error / norm if norm else 0.0


def _log_peaks(matrix: Tensor, axis: int) -> Tensor:
    """log₂ of the largest magnitude along an axis; −∞ where all are 0."""
    return matrix.abs().amax(axis).log2()


def _product_norm(left: Tensor, right: Tensor) -> float:
    """‖left · right‖."""
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


def rank_of_equal_bytes(site: DeltaSite) -> int:
    """The largest rank whose 16-bit factors take no more bytes than the site, rows of a grown vocabulary aside."""
    added = 0 if site.added is None else site.added.nbytes
    rank = (site.nbytes - added) // (2 * max(site.out_features + site.in_features, 1))
    return min(rank, site.out_features, site.in_features)


def svd_of_equal_bytes(site: DeltaSite, base: Checkpoint, finetune: Checkpoint) -> LowRankSite:
    """The site with a truncated SVD of fine-tune − base as its delta, in no more bytes.

    By the randomized method of Halko, Martinsson and Tropp (arXiv 0909.4061, `torch.svd_lowrank`) with a fixed seed.
    Raises `ArchitectureError` if the fine-tune's parameter has another shape than the site.
    """
    shape = finetune.shape(site.name)
    if shape != site.shape:
        raise ArchitectureError(
            f"expected {site.name} of the fine-tune in the delta's shape {site.shape}, found {shape}",
            hint="give the fine-tune that the delta was made of",
        )
    base_matrix, finetune_matrix = (
        to_matrix(checkpoint.tensor(site.name).float(), transposed=site.transposed)[: site.out_features]
        for checkpoint in (base, finetune)
    )
    u, s, v = _truncated_svd(finetune_matrix - base_matrix, rank_of_equal_bytes(site))
    root = s.sqrt()
    factors = Factors.from_product(u * root, root[:, None] * v.T)
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


def _truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U `[rows, rank]`, S `[rank]`, V `[columns, rank]`."""
    if rank == 0:
        return matrix.new_zeros(matrix.shape[0], 0), matrix.new_zeros(0), matrix.new_zeros(matrix.shape[1], 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(2 * rank + 16, *matrix.shape), _POWER_ITERATIONS)
    return u[:, :rank], s[:rank], v[:, :rank]
