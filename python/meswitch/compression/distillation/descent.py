"""Adam on a site's scales: the rate falls to a tenth, and the best that was seen on held-out text is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.compression.distillation.learner import Learner
from meswitch.compression.distillation.products import QuickGradients
from meswitch.errors import NonFiniteError


@dataclass(frozen=True)
class Recipe:
    """Steps, windows a step, Adam's rate on the logarithm of each scale, and the seed that orders windows.

    The rate is `fastest`, or less if `finds` says to find it (see `descend`).
    """

    steps: int
    batch: int
    fastest: float
    finds: bool
    seed: int


def descend(
    learners: list[Learner],
    recipe: Recipe,
    batches: Iterator[Tensor],
    loss: Callable[[Tensor], float],
    score: Callable[[], float],
    looks: int,
    told: Callable[[Tensor], None],
) -> tuple[float, float, int]:
    """Leaves the best scales in the learners; returns the score before, the best, and the steps taken.

    `loss` adds the gradients of a batch and returns its value; `score` judges the scales as they would be stored, and
    is asked `looks` times over the run. A loss that is not finite ends it. A rate that is found is the one at which the
    first step would take the loss to nothing if it fell all the way as it does at the start (Polyak's step, of one size
    in every scale): small where gradients are mostly noise. Raises `NonFiniteError` for a score at the start that is
    none.
    """
    before = best = score()
    if not math.isfinite(before):
        raise NonFiniteError(f"expected fine-tune and expert to answer in finite numbers, found an error of {before}")
    moved = [move for learner in learners for move in learner.moved.values()]
    if not moved:
        return before, best, 0
    adam, rate = torch.optim.Adam(moved, betas=(0.9, 0.99)), recipe.fastest
    kept = [move.detach().clone() for move in moved]
    every, step = max(1, -(-recipe.steps // looks)), 0
    for step, batch in enumerate(batches, start=1):
        adam.zero_grad()
        with QuickGradients():
            error = loss(batch)
        if not math.isfinite(error):
            break
        if recipe.finds and step == 1:
            slope = sum(float(move.grad.abs().sum()) for move in moved if move.grad is not None)
            rate = min(error / slope, rate) if slope > 0 else rate
        adam.param_groups[0]["lr"] = rate * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / recipe.steps))
        adam.step()
        if step % every == 0 or step == recipe.steps:
            found = score()
            if found < best:
                best, kept = found, [move.detach().clone() for move in moved]
        told(batch)
    with torch.no_grad():
        for move, keep in zip(moved, kept, strict=True):
            move.copy_(keep)
    return before, best, step
