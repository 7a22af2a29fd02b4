"""The space an embedding router works in: standardised principal components, and distances to labels' centres."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

_SHRINKAGE = 0.3


@dataclass(frozen=True)
class Space:
    """A projection of embeddings `[n, d]` to `[n, k]`, and the centre of every label in it.

    The field names are those of the tensors in a router's file.
    """

    mean: Tensor  # [d]
    scale: Tensor  # [d]
    components: Tensor  # [d, k], orthonormal
    whitening: Tensor  # [k, k]: ‖(z - c)·W‖ is the Mahalanobis distance within labels
    left: Tensor  # []: mean square of what the components leave out of an embedding
    centers: Tensor  # [labels, k]

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, count: int, k: int) -> Space:
        """`k` components of the embeddings `x [n, d]`, whose labels are `y int64 [n]`, below `count`."""
        mean, scale = x.mean(0), x.std(0, correction=0) + 1e-6
        standard = (x - mean) / scale / math.sqrt(x.shape[1])
        components = _principal_directions(standard, k)
        z = standard @ components
        centers = torch.stack([z[y == label].mean(0) for label in range(count)])
        left = (standard.square().sum(1) - z.square().sum(1)).mean().clamp_min(1e-12)
        return cls(mean, scale, components, _whitening(z - centers[y]), left, centers)

    def project(self, x: Tensor) -> Tensor:
        """Embeddings `[n, d]` to their components `[n, k]`."""
        return self._standardise(x) @ self.components

    def _standardise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale / math.sqrt(x.shape[1])

    def distances(self, x: Tensor) -> Tensor:
        """From each embedding to every label's centre, `[n, labels]`; what the components leave out counts too."""
        standard = self._standardise(x)
        z = standard @ self.components
        outside = (standard - z @ self.components.T).square().sum(1) / self.left * z.shape[1]
        inside = (z @ self.whitening)[:, None] - self.centers @ self.whitening
        return (inside.square().sum(2) + outside[:, None]).sqrt()


def _principal_directions(x: Tensor, count: int) -> Tensor:
    """The first principal directions of centred rows, `[d, count]`, through the smaller of the two Gram matrices."""
    if x.shape[0] >= x.shape[1]:
        directions: Tensor = torch.linalg.eigh(x.T @ x)[1][:, -count:]
    else:
        directions = x.T @ torch.linalg.eigh(x @ x.T)[1][:, -count:]
    return normalize(directions, dim=0)


def _whitening(residuals: Tensor) -> Tensor:
    """From `residuals [n, k]`, embeddings less their label's centre: an inverse root of their shrunken covariance."""
    covariance = residuals.T @ residuals / len(residuals)
    floor = covariance.diagonal().mean().clamp_min(1e-12)
    covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * floor * torch.eye(len(covariance), dtype=residuals.dtype)
    root: Tensor = torch.linalg.inv(torch.linalg.cholesky(covariance))
    return root.T.contiguous()
