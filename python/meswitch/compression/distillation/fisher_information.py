"""The Fisher information of hidden states: what an error there costs, in nats of KL.

A small error e of a token's hidden state changes the model's predictions by about ½ eᵀ F e nats, with
F = E[g gᵀ], the Fisher information. g is the gradient of log p(token) with respect to that hidden state, for a token
drawn from the model's own p. Measured by one backward pass, a block at a time, over a few thousand tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from meswitch.compression.distillation.hidden_states import allocate
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder

_TOKENS = 4096
_LOGITS = 2**24  # logits, and weights of the head, that are in memory at a time: 64 MiB
_DAMPING = 0.1  # of the mean of F's diagonal, added to it: so few tokens do not reach every direction


class FisherInformation:
    """Measured for `finetune`, before each block and after the last, on the first windows of `ids`.

    `ids int64 [windows, length]`, of which about 4,096 tokens are used. `batch`: windows that run at a time. `folder`:
    where hidden states may lie, see `hidden_states.allocate`.
    """

    def __init__(
        self, decoder: Decoder, finetune: Checkpoint, ids: Tensor, batch: int, seed: int, folder: Path
    ) -> None:
        self._decoder, self._finetune = decoder, finetune
        self._outer, self._bias = decoder.outer_parameters(finetune.tensor), decoder.head_bias(finetune.tensor)
        self._generator = torch.Generator().manual_seed(seed)
        ids = ids[: max(1, _TOKENS // ids.shape[1])]
        self._batches = torch.arange(len(ids)).split(batch)
        hidden = self._hidden_states(ids, folder)
        self._gradients = self._replace_by_gradients(hidden)

    def before_block(self, block: int) -> Tensor:
        """F, damped, of the hidden states before a block, or after the last one: `float32 [hidden, hidden]`."""
        gradients = self._gradients[block].flatten(0, 1)
        fisher = gradients.T @ gradients / len(gradients)
        fisher.diagonal().add_(_DAMPING * fisher.diagonal().mean())
        return fisher

    @torch.no_grad()
    def _hidden_states(self, ids: Tensor, folder: Path) -> Tensor:
        """Before each block and after the last: `[blocks + 1, windows, length, hidden]`."""
        decoder, tokens = self._decoder, ids.unique()
        rows = self._finetune.tensor(decoder.embedding)[tokens].float()
        embedded = torch.cat([decoder.embed(self._outer, tokens, rows, ids[batch]) for batch in self._batches])
        hidden = allocate((len(decoder) + 1, *embedded.shape), folder)
        hidden[0] = embedded
        for block in range(len(decoder)):
            parameters = decoder.block_parameters(block, self._finetune.tensor)
            for batch in self._batches:
                hidden[block + 1, batch] = decoder.run_block(block, parameters, hidden[block, batch])
        return hidden

    def _replace_by_gradients(self, hidden: Tensor) -> Tensor:
        """Overwrites the hidden states by the gradients of log p, from the last to the first."""
        decoder = self._decoder
        for batch in self._batches:
            last = hidden[-1, batch].requires_grad_()
            x = decoder.head_input(self._outer, last)
            x.backward(self._head_gradient(x.detach()))
            hidden[-1, batch] = _gradient(last)
        for block in reversed(range(len(decoder))):
            parameters = decoder.block_parameters(block, self._finetune.tensor)
            for batch in self._batches:
                before = hidden[block, batch].requires_grad_()
                decoder.run_block(block, parameters, before).backward(hidden[block + 1, batch])
                hidden[block, batch] = _gradient(before)
        return hidden

    def _head_gradient(self, x: Tensor) -> Tensor:
        """The gradient of log p(token) by the head's input `x`, for a token drawn from p at every position.

        The head is processed a few rows at a time, once to draw and once for gradients.
        """
        head, tokens = self._finetune.tensor(self._decoder.head), x.shape[0] * x.shape[1]
        pieces = torch.arange(len(head)).split(max(1, _LOGITS // max(tokens, head.shape[1])))
        drawn, log_total = self._draw_tokens(x, pieces, head)
        x = x.requires_grad_()
        for rows in pieces:
            logits = self._logits(x, rows, head)
            gradient = (drawn[..., None] == rows).float().sub_((logits.detach() - log_total[..., None]).exp())
            logits.backward(gradient)
        return _gradient(x)

    def _draw_tokens(self, x: Tensor, pieces: tuple[Tensor, ...], head: Tensor) -> tuple[Tensor, Tensor]:
        """A token drawn from the softmax at every position, and the logsumexp of the logits."""
        positions = x.shape[:-1]
        log_total, highest = torch.full(positions, -torch.inf), torch.full(positions, -torch.inf)
        drawn = torch.zeros(positions, dtype=torch.int64)
        for rows in pieces:
            logits = self._logits(x, rows, head)
            log_total = torch.logaddexp(log_total, logits.logsumexp(-1))
            # The largest logit plus Gumbel noise is a draw from their softmax.
            noise = -torch.empty_like(logits).exponential_(generator=self._generator).log()
            candidate, index = (logits + noise).max(-1)
            drawn, highest = torch.where(candidate > highest, rows[index], drawn), torch.maximum(candidate, highest)
        return drawn, log_total

    def _logits(self, x: Tensor, rows: Tensor, head: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias[rows]
        return self._decoder.logits(x, head[rows].float(), bias).float()


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None  # its backward pass has run
    return tensor.grad
