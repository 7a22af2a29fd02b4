"""The linear head of an embedding router: the space it works in, its fit, and what is held out to calibrate it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

_COMPONENTS = 128
_FOLDS = 5
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_SHRINKAGE = 0.3


@dataclass(frozen=True)
class Space:
    """Standardised principal components of embeddings, and distances in them and beside them."""

    mean: Tensor  # [d]
    scale: Tensor  # [d]
    components: Tensor  # [d, k], orthonormal
    whitening: Tensor  # [k, k]: ‖(z - c)·W‖ is the Mahalanobis distance within labels
    left: Tensor  # []: mean square of what the components leave out of an embedding
    centers: Tensor  # [labels, k]

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, count: int, k: int) -> Space:
        mean, scale = x.mean(0), x.std(0, correction=0) + 1e-6
        standard = (x - mean) / scale / math.sqrt(x.shape[1])
        components = _principal(standard, k)
        z = standard @ components
        centers = torch.stack([z[y == label].mean(0) for label in range(count)])
        left = (standard.square().sum(1) - z.square().sum(1)).mean().clamp_min(1e-12)
        return cls(mean, scale, components, _whitening(z - centers[y]), left, centers)

    def __call__(self, x: Tensor) -> Tensor:
        return self._standard(x) @ self.components

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale / math.sqrt(x.shape[1])

    def distances(self, x: Tensor) -> Tensor:
        """To every label's centre, `[n, labels]`."""
        standard = self._standard(x)
        z = standard @ self.components
        beside = (standard - z @ self.components.T).square().sum(1) / self.left * z.shape[1]
        within = (z @ self.whitening)[:, None] - self.centers @ self.whitening
        return (within.square().sum(2) + beside[:, None]).sqrt()


def _principal(x: Tensor, count: int) -> Tensor:
    """The first principal directions of centred rows, `[d, count]`, through the smaller of the two Gram matrices."""
    if x.shape[0] >= x.shape[1]:
        directions: Tensor = torch.linalg.eigh(x.T @ x)[1][:, -count:]
    else:
        directions = x.T @ torch.linalg.eigh(x @ x.T)[1][:, -count:]
    return normalize(directions, dim=0)


def _whitening(spread: Tensor) -> Tensor:
    """From `spread [n, k]`, embeddings less their label's centre: an inverse root of their shrunken covariance."""
    covariance = spread.T @ spread / len(spread)
    floor = covariance.diagonal().mean().clamp_min(1e-12)
    covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * floor * torch.eye(len(covariance), dtype=spread.dtype)
    root: Tensor = torch.linalg.inv(torch.linalg.cholesky(covariance))
    return root.T.contiguous()


def fit_head(z: Tensor, y: Tensor, count: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with an L2 penalty: W `[k, count]`, b `[count]`."""
    weight = torch.zeros(z.shape[1], count, dtype=z.dtype, requires_grad=True)
    bias = torch.zeros(count, dtype=z.dtype, requires_grad=True)
    # Each label weighs the same, however many prompts it has.
    share = torch.bincount(y, minlength=count).clamp_min(1).to(z.dtype).reciprocal()
    minimise(
        [weight, bias],
        lambda: cross_entropy(z @ weight + bias, y, weight=share) + penalty / 2 * weight.square().sum(),
    )
    return weight.detach(), bias.detach()


def minimise(parameters: list[Tensor], loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    # Thousands of tiny products: handing each to several threads costs far more than it saves.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            optimizer.step(closure)
    finally:
        torch.set_num_threads(threads)


def _folds(y: Tensor, seed: int) -> Tensor:
    """A fold for each prompt, every label spread evenly over them."""
    generator = torch.Generator().manual_seed(seed)
    folds = torch.empty_like(y)
    for label in range(int(y.max()) + 1):
        index = (y == label).nonzero().squeeze(1)
        folds[index[torch.randperm(len(index), generator=generator)]] = torch.arange(len(index)) % _FOLDS
    return folds


@dataclass(frozen=True)
class HeldOut:
    """What the folds' heads say of prompts they have not seen."""

    components: int
    penalty: float
    temperature: float
    distances: Tensor  # [n], to the prompt's own centre


def cross_validate(x: Tensor, y: Tensor, count: int, seed: int) -> HeldOut:
    folds = _folds(y, seed)
    # A third of what the folds' prompts can span, in every fit: what is left must mean something on prompts never seen.
    k = min(_COMPONENTS, max(count, len(y) * (_FOLDS - 1) // _FOLDS // 3), x.shape[1])
    logits = torch.zeros(len(_PENALTIES), len(y), count, dtype=x.dtype)
    distances = torch.zeros(len(y), dtype=x.dtype)
    for fold in range(_FOLDS):
        out = folds == fold
        if not out.any():
            continue
        space = Space.fit(x[~out], y[~out], count, k)
        z, held = space(x[~out]), space(x[out])
        distances[out] = space.distances(x[out]).gather(1, y[out][:, None]).squeeze(1)
        for row, penalty in enumerate(_PENALTIES):
            weight, bias = fit_head(z, y[~out], count, penalty)
            logits[row, out] = held @ weight + bias
    fits = [(_temperature(rows, y), rows, penalty) for rows, penalty in zip(logits, _PENALTIES, strict=True)]
    temperature, _, penalty = min(fits, key=lambda fit: float(cross_entropy(fit[1] / fit[0], y)))
    return HeldOut(k, penalty, temperature, distances)


def _temperature(logits: Tensor, y: Tensor) -> float:
    """What the logits are divided by for the held-out likelihood to be highest."""
    log = torch.zeros((), dtype=logits.dtype, requires_grad=True)
    # The penalty keeps it finite where every held-out prompt is right.
    minimise([log], lambda: cross_entropy(logits / log.exp(), y) + 0.01 * log.square())
    return float(log.detach().exp())
