"""The linear head of an embedding router: its fit, a label added later, and what is held out to calibrate it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.router.embedding.space import Space

_COMPONENTS = 128
_FOLDS = 5
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def fit_head(z: Tensor, y: Tensor, count: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with an L2 penalty: W `[k, count]`, b `[count]`."""
    weight = torch.zeros(z.shape[1], count, dtype=z.dtype, requires_grad=True)
    bias = torch.zeros(count, dtype=z.dtype, requires_grad=True)
    # Each label weighs the same, however many prompts it has.
    share = torch.bincount(y, minlength=count).clamp_min(1).to(z.dtype).reciprocal()
    _minimise(
        [weight, bias],
        lambda: cross_entropy(z @ weight + bias, y, weight=share) + penalty / 2 * weight.square().sum(),
    )
    return weight.detach(), bias.detach()


def fit_added_label(logits: Tensor, z: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """One more label beside those of `logits [n, count]`, which stay as they are: its weights `[k]` and bias `[]`.

    `z [n, k]` are components of prompts and `y` their labels, `count` being the new one.
    """
    share = torch.bincount(y).clamp_min(1).double().reciprocal()
    weight = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        extended = torch.cat([logits, (z @ weight + bias)[:, None]], dim=1)
        return cross_entropy(extended, y, weight=share) + penalty / 2 * weight.square().sum()

    _minimise([weight, bias], loss)
    return weight.detach(), bias.detach()


def _minimise(parameters: list[Tensor], loss: Callable[[], Tensor]) -> None:
    """Moves the parameters to where the loss is least, by L-BFGS."""
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


@dataclass(frozen=True)
class HeldOut:
    """What the folds' heads say of prompts they have not seen: the settings that suit those best."""

    components: int
    penalty: float
    temperature: float
    distances: Tensor  # [n], to the prompt's own centre


def cross_validate(x: Tensor, y: Tensor, count: int, seed: int, progress: ProgressCallback | None = None) -> HeldOut:
    """Settings for embeddings `x float64 [n, d]` with labels `y int64 [n]`, below `count`, by five folds.

    `progress` counts the heads that are fitted.
    """
    folds = _folds(y, seed)
    meter = ProgressMeter(progress, "fitting the router", _FOLDS * len(_PENALTIES))
    meter.update(0)
    # A third of what the folds' prompts can span, in every fit: what is left must mean something on prompts never seen.
    k = min(_COMPONENTS, max(count, len(y) * (_FOLDS - 1) // _FOLDS // 3), x.shape[1])
    logits = torch.zeros(len(_PENALTIES), len(y), count, dtype=x.dtype)
    distances = torch.zeros(len(y), dtype=x.dtype)
    for fold in range(_FOLDS):
        out = folds == fold
        if not out.any():
            meter.advance(len(_PENALTIES))
            continue
        space = Space.fit(x[~out], y[~out], count, k)
        z, unseen = space.project(x[~out]), space.project(x[out])
        distances[out] = space.distances(x[out]).gather(1, y[out][:, None]).squeeze(1)
        for row, penalty in enumerate(_PENALTIES):
            weight, bias = fit_head(z, y[~out], count, penalty)
            logits[row, out] = unseen @ weight + bias
            meter.advance(1)
    fits = [(_temperature(rows, y), rows, penalty) for rows, penalty in zip(logits, _PENALTIES, strict=True)]
    temperature, _, penalty = min(fits, key=lambda fit: float(cross_entropy(fit[1] / fit[0], y)))
    return HeldOut(k, penalty, temperature, distances)


def _folds(y: Tensor, seed: int) -> Tensor:
    """A fold for each prompt, every label spread evenly over them."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    folds = torch.empty_like(y)
    for label in range(int(y.max()) + 1):
        index = (y == label).nonzero().squeeze(1)
        folds[index[torch.randperm(len(index), generator=generator)]] = torch.arange(len(index)) % _FOLDS
    return folds


def _temperature(logits: Tensor, y: Tensor) -> float:
    """What the logits are divided by for the held-out likelihood to be highest."""
    log = torch.zeros((), dtype=logits.dtype, requires_grad=True)
    # The penalty keeps it finite where every held-out prompt is right.
    _minimise([log], lambda: cross_entropy(logits / log.exp(), y) + 0.01 * log.square())
    return float(log.detach().exp())
