"""One factor for all scales, after they have learned: a fit to noise shrinks what it fits, and this gives it back.

Distilled scales trade a little of the delta for less of its noise, as any regression does. KL hardly sees that, being
of second order, but the likelihood of text that the fine-tune is good at falls at first order. The factor is the one at
which the expert finds such text, none that was trained on here, as likely as the fine-tune does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from meswitch.distill.learner import Learner

_PROBE, _MOST = math.log(1.02), math.log(1.05)


@torch.no_grad()
def level(learners: Iterable[Learner], measure: Callable[[], tuple[float, float]], most: float) -> float:
    """Moves row scales and `u` by the factor, at most 5 % either way; returns KL with them as they are then.

    `measure` gives, with the scales as stored, KL and how much less likely the expert finds the text, in nats a token
    each. Where the factor would bring KL to `most` or beyond, the scales stay.
    """
    moved = [move for learner in learners for role, move in learner.moved.items() if role != "column_scales"]
    start, gap = measure()

    def shift(by: float) -> tuple[float, float]:
        for move, value in zip(moved, kept, strict=True):
            move.copy_(value + by)
        return measure()

    kept = [move.clone() for move in moved]
    slope = (shift(_PROBE)[1] - gap) / _PROBE
    factor = max(-_MOST, min(_MOST, -gap / slope)) if slope < 0 else 0.0
    found, left = shift(factor)
    if found < most and abs(left) < abs(gap):
        return found
    shift(0.0)
    return start
