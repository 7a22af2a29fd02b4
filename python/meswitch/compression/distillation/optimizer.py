"""Adam on the scales of some sites. The rate falls to a tenth, and the best scales on held-out text are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch.compression.distillation.bfloat16_gradients import Bfloat16Gradients
from meswitch.compression.distillation.scales import TrainableScales
from meswitch.errors import NonFiniteError


@dataclass(frozen=True)
class Schedule:
    """The number of steps, windows a step, the learning rate, and the seed that orders the windows.

    The learning rate is on the logarithm of each scale: `max_rate`, or less where `adapt_rate` derives it from the
    first step (see `optimize`).
    """

    steps: int
    batch: int
    max_rate: float
    adapt_rate: bool
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The held-out score before training and the best one, and the number of steps."""

    before: float
    after: float
    steps: int


def optimize(
    sites: list[TrainableScales],
    schedule: Schedule,
    batches: Iterator[Tensor],
    loss: Callable[[Tensor], float],
    score: Callable[[], float],
    evaluations: int,
    on_step: Callable[[Tensor], None],
) -> Outcome:
    """Trains the scales of `sites` and leaves the best ones in them.

    `loss` adds the gradients of a batch and returns its value. `score` measures the scales as they would be stored;
    lower is better, and it is called before training and about `evaluations` times over the run. `on_step` is called
    after every step with its batch. A loss that is not finite ends the run early.

    With `schedule.adapt_rate` the rate is the first loss over the sum of its slopes' magnitudes (at most `max_rate`):
    Polyak's step with equal lengths in all scales. It is small where gradients are mostly noise.

    Raises `NonFiniteError` if the score before training is not finite.
    """
    before = best_score = score()
    if not math.isfinite(before):
        raise NonFiniteError(f"expected fine-tune and expert to answer in finite numbers, found an error of {before}")
    shifts = [shift for scales in sites for shift in scales.shifts.values()]
    if not shifts:
        return Outcome(before, before, steps=0)
    adam, rate = torch.optim.Adam(shifts, betas=(0.9, 0.99)), schedule.max_rate
    best_shifts = _copies(shifts)
    interval, step = max(1, -(-schedule.steps // evaluations)), 0
    for step, batch in enumerate(batches, start=1):
        adam.zero_grad()
        with Bfloat16Gradients():
            loss_value = loss(batch)
        if not math.isfinite(loss_value):
            break
        if schedule.adapt_rate and step == 1:
            rate = _first_rate(loss_value, shifts, rate)
        adam.param_groups[0]["lr"] = rate * _decay(step, schedule.steps)
        adam.step()
        if step % interval == 0 or step == schedule.steps:
            new_score = score()
            if new_score < best_score:
                best_score, best_shifts = new_score, _copies(shifts)
        on_step(batch)
    _restore(shifts, best_shifts)
    return Outcome(before, best_score, step)


def _first_rate(loss: float, shifts: list[torch.nn.Parameter], max_rate: float) -> float:
    """The rate at which the first step would bring the loss to 0 if it fell all the way as it does at the start."""
    slope = sum(float(shift.grad.abs().sum()) for shift in shifts if shift.grad is not None)
    return min(loss / slope, max_rate) if slope > 0 else max_rate


def _decay(step: int, steps: int) -> float:
    """The factor of the rate: from 1 at step 1 to about a tenth at the last, along a cosine."""
    return 0.55 + 0.45 * math.cos(math.pi * (step - 1) / steps)


@torch.no_grad()
def _restore(shifts: list[torch.nn.Parameter], copies: list[Tensor]) -> None:
    for shift, copy in zip(shifts, copies, strict=True):
        shift.copy_(copy)


def _copies(shifts: list[torch.nn.Parameter]) -> list[Tensor]:
    return [shift.detach().clone() for shift in shifts]
