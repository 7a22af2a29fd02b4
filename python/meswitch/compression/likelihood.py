"""Negative log-likelihood (NLL) and KL divergence of next-token predictions, summed over tokens, in nats.

    log p, log q      log-probabilities float32 [tokens, vocabulary] of the model that is matched, and of the other
    KL(p ‖ q)         Σ p · (log p − log q)
    NLL               −log q[target]

`kl_sum` and `nll_sum` are differentiable and sum in float32. `nll_score` and `prediction_sums` are for scores: they sum
in float64, the NLL in the same way, so that equal models get equal scores. `kl_by_vocabulary_pieces` never holds all
logits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

NO_TARGET = -1
"""The target of a token whose next token is not known; it does not count."""


def kl_sum(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q), a differentiable scalar.

    >>> round(float(kl_sum(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())), 4)
    0.1438
    """
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def nll_sum(log_q: Tensor, targets: Tensor) -> Tensor:
    """NLL of `targets int64 [tokens]`, a differentiable scalar; `NO_TARGET` counts as 0.

    >>> round(float(nll_sum(torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log(), torch.tensor([0, NO_TARGET]))), 4)
    0.6931
    """
    return F.nll_loss(log_q, targets, ignore_index=NO_TARGET, reduction="sum")


def nll_score(log_q: Tensor, targets: Tensor) -> Tensor:
    """NLL of `targets int64 [tokens]`, a `float64` scalar.

    >>> round(float(nll_score(torch.tensor([[0.5, 0.5], [0.1, 0.9]]).log(), torch.tensor([0, 1]))), 4)
    0.7985
    """
    return -log_q.gather(1, targets[:, None]).sum(dtype=torch.float64)


def prediction_sums(log_p: Tensor, log_q: Tensor, targets: Tensor) -> Tensor:
    """`float64 [4]`: NLL of p, NLL of q, KL(p ‖ q), and on how many tokens both find the same token most likely.

    >>> p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log()
    >>> [round(value, 4) for value in prediction_sums(p, q, torch.tensor([0])).tolist()]
    [0.6931, 1.3863, 0.1733, 0.0]
    """
    p = log_p.exp()
    # A token that both rule out would give 0 · (−∞ + ∞) = NaN.
    kl = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return torch.stack(
        [
            nll_score(log_p, targets),
            nll_score(log_q, targets),
            kl.sum(dtype=torch.float64),
            (log_p.argmax(-1) == log_q.argmax(-1)).sum(dtype=torch.float64),
        ]
    )


def kl_by_vocabulary_pieces(logits: Iterable[tuple[Tensor, Tensor]], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p ‖ q), logsumexp of p's logits and logsumexp of q's logits: `float32 [tokens]` each, in one pass.

    `logits`: of p and q, `[tokens, n]` each, for one piece of the vocabulary after the other. With logits z,
    KL = Σ p · (z_p − z_q) − logsumexp(z_p) + logsumexp(z_q); the sum over p is rescaled whenever its maximum grows.

    >>> z_p, z_q = torch.arange(60.0).sin().view(2, 3, 10)
    >>> kl, _, _ = kl_by_vocabulary_pieces(zip(z_p.split(4, 1), z_q.split(4, 1)), tokens=3)
    >>> torch.allclose(kl.sum(), kl_sum(z_p.log_softmax(-1), z_q.log_softmax(-1)), atol=1e-5)
    True
    """
    maximum = torch.full((tokens,), -torch.inf)
    mass, gap, log_total_q = torch.zeros(tokens), torch.zeros(tokens), maximum.clone()
    for logits_p, logits_q in logits:
        log_total_q = torch.logaddexp(log_total_q, logits_q.logsumexp(-1))
        higher = torch.maximum(maximum, logits_p.amax(-1))
        rescale, p = (maximum - higher).exp(), (logits_p - higher[:, None]).exp()
        mass = mass * rescale + p.sum(-1)
        gap = gap * rescale + (p * (logits_p - logits_q)).sum(-1)
        maximum = higher
    log_total_p = mass.log() + maximum
    return gap / mass - log_total_p + log_total_q, log_total_p, log_total_q
