"""KL(fine-tune ‖ expert) of the logits of two heads, a few rows of the heads at a time.

Memory holds neither all logits nor a whole head in float32. A first pass over the rows gives KL and both logsumexp
(`likelihood.kl_by_vocabulary_pieces`). A second pass sends the gradients back through each piece: that of KL by an
expert's logit is q − p, that of the NLL q − 1[token].
"""

from __future__ import annotations

import torch
from torch import Tensor

from meswitch.compression.distillation.expert_weight import ExpertWeight
from meswitch.compression.distillation.scales import TrainableScales
from meswitch.compression.distillation.windows import text_weight
from meswitch.compression.likelihood import NO_TARGET, kl_by_vocabulary_pieces
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder
from meswitch.site import Site

_PIECE = 2**24  # logits, and weights of the head, at a time: 64 MiB each


class HeadDivergence:
    """The heads of fine-tune and expert.

    `finetune`: the fine-tune's head `[vocabulary, width]`, mapped. `site`, `base`, `scales`: the expert's, see
    `ExpertWeight`. `biases` of fine-tune and expert. `tokens`: about how many are scored in one call.
    """

    def __init__(
        self,
        decoder: Decoder,
        finetune: Tensor,
        site: Site,
        base: Checkpoint,
        scales: TrainableScales | None,
        biases: tuple[Tensor | None, Tensor | None],
        tokens: int,
    ) -> None:
        self._decoder, self._finetune = decoder, finetune
        self._finetune_bias, self._expert_bias = biases
        count = max(1, _PIECE // max(finetune.shape[1], tokens))
        self._pieces = torch.arange(len(finetune)).split(count)
        keep_base = len(self._pieces) == 1
        self._weights = [ExpertWeight(site, base, scales, piece, keep_base=keep_base) for piece in self._pieces]

    @torch.no_grad()
    def score(self, x: Tensor, y: Tensor) -> float:
        """KL summed over tokens, with the scales as stored. `x`, `y [tokens, width]`: inputs of the two heads."""
        return float(self._divergences(x, y, rounded=True)[0].sum(dtype=torch.float64))

    def add_gradients(self, x: Tensor, y: Tensor, next_tokens: Tensor) -> float:
        """Adds the gradients of mean KL + `text_weight` · mean NLL of `next_tokens int64 [tokens]`; returns mean KL.

        `x`, `y [tokens, width]`: inputs of the two heads.
        """
        share = 1 / len(x)
        with torch.no_grad():
            kl_of_tokens, log_total_p, log_total_q = self._divergences(x, y, rounded=False)
        kl = share * float(kl_of_tokens.sum(dtype=torch.float64))
        weight = text_weight(kl)
        nll_weights = weight * (next_tokens != NO_TARGET)[:, None]
        for piece, rows in enumerate(self._pieces):
            with torch.no_grad():
                p = (self._finetune_logits(piece, x) - log_total_p[:, None]).exp_()
            logits = self._expert_logits(piece, y, rounded=False)
            if logits.requires_grad:
                is_next = weight * (next_tokens[:, None] == rows)
                gradient = (logits.detach() - log_total_q[:, None]).exp_().mul_(1 + nll_weights).sub_(p).sub_(is_next)
                torch.autograd.backward(logits, gradient.mul_(share))
        return kl

    def _divergences(self, x: Tensor, y: Tensor, *, rounded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """KL, logsumexp of the fine-tune's logits, and of the expert's, of each token."""
        logits = (
            (self._finetune_logits(piece, x), self._expert_logits(piece, y, rounded=rounded))
            for piece in range(len(self._pieces))
        )
        return kl_by_vocabulary_pieces(logits, len(x))

    def _finetune_logits(self, piece: int, x: Tensor) -> Tensor:
        rows = self._pieces[piece]
        return self._logits(x, self._finetune[rows].float(), self._finetune_bias, rows)

    def _expert_logits(self, piece: int, y: Tensor, *, rounded: bool) -> Tensor:
        return self._logits(y, self._weights[piece](rounded=rounded), self._expert_bias, self._pieces[piece])

    def _logits(self, inputs: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        return self._decoder.logits(inputs, weight, None if bias is None else bias[rows]).float()
