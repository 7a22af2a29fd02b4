"""KL of two heads' logits, a few of their rows at a time: memory holds neither all logits nor a whole head.

With logits z_p, z_q of fine-tune and expert, KL(p ‖ q) = Σ p · (z_p − z_q) − logsumexp(z_p) + logsumexp(z_q) is summed
in one pass over the rows. Its gradient by z_q is q − p, which a second pass sends back through each piece, with
q − t for the token t that the text goes on with at its weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meswitch.compression.distillation.learner import Learner, Weight
from meswitch.compression.distillation.windows import text_weight
from meswitch.compression.likelihood import NO_TARGET, kl_by_vocabulary_pieces
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder
from meswitch.site import Site

_PIECE = 2**24  # logits, and weights of the head, at a time: 64 MiB each


class Heads:
    """The heads of fine-tune and expert; `finetune` is the former's parameter, mapped."""

    def __init__(
        self,
        decoder: Decoder,
        finetune: Tensor,
        site: Site,
        base: Checkpoint,
        learner: Learner | None,
        biases: tuple[Tensor | None, Tensor | None],
        tokens: int,
    ) -> None:
        """`tokens`: about how many are asked about at once."""
        self._decoder, self._finetune, self._biases = decoder, finetune, biases
        count = max(1, _PIECE // max(finetune.shape[1], tokens))
        self._pieces = torch.arange(len(finetune)).split(count)
        alone = len(self._pieces) == 1
        self._weights = [Weight(site, base, learner, piece, keep=alone) for piece in self._pieces]

    @torch.no_grad()
    def compare(self, x: Tensor, y: Tensor) -> float:
        """KL(fine-tune ‖ expert) with the scales as stored, where the heads see `x` and `y [tokens, width]`: a sum."""
        return float(self._sums(x, y, rounded=True)[0].sum(dtype=torch.float64))

    def descend(self, x: Tensor, y: Tensor, following: Tensor) -> float:
        """Adds the gradients of its mean and, at `text_weight`, that of the NLL of what follows; returns the former.

        `following int64 [tokens]`; the scales as they are.
        """
        share = 1 / len(x)
        with torch.no_grad():
            divergences, wanted, found = self._sums(x, y, rounded=False)
        divergence = share * float(divergences.sum(dtype=torch.float64))
        weight = text_weight(divergence)
        text = weight * (following != NO_TARGET)[:, None]
        for at, rows in enumerate(self._pieces):
            with torch.no_grad():
                target = (self._logits_of_finetune(at, x) - wanted[:, None]).exp_()
            logits = self._logits_of_expert(at, y, rounded=False)
            if logits.requires_grad:
                here = weight * (following[:, None] == rows)
                gradient = (logits.detach() - found[:, None]).exp_().mul_(1 + text).sub_(target).sub_(here)
                torch.autograd.backward(logits, gradient.mul_(share))
        return divergence

    def _sums(self, x: Tensor, y: Tensor, *, rounded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """KL, and the logarithms of both sums of exponentials, of each token."""
        pieces = (
            (self._logits_of_finetune(at, x), self._logits_of_expert(at, y, rounded=rounded))
            for at in range(len(self._pieces))
        )
        return kl_by_vocabulary_pieces(pieces, len(x))

    def _logits_of_finetune(self, at: int, x: Tensor) -> Tensor:
        rows = self._pieces[at]
        bias = self._biases[0]
        return self._decoder.logits(x, self._finetune[rows].float(), None if bias is None else bias[rows]).float()

    def _logits_of_expert(self, at: int, y: Tensor, *, rounded: bool) -> Tensor:
        rows = self._pieces[at]
        bias = self._biases[1]
        return self._decoder.logits(y, self._weights[at](rounded), None if bias is None else bias[rows]).float()
