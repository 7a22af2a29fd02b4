"""What a fine-tune's answers are sensitive to, between its blocks.

A small change e of a token's hidden state moves the model's answers by about ½ eᵀ F e nats, F = E[g gᵀ] being the
Fisher information: g is the gradient of log p(token) by that hidden state, the token drawn from the model's own p.
Measured backwards, a block at a time, over a few thousand tokens, it makes an error of hidden states count as KL does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from meswitch.compression.distillation.hidden import room
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder

_TOKENS = 4096
_LOGITS = 2**24  # of the head, and weights of it, at a time: 64 MiB
_DAMPING = 0.1  # of the mean sensitivity, in every direction: so few tokens do not know them all


class Sensitivity:
    """Of `finetune` at every place between its blocks, on the first of the windows `ids int64 [windows, length]`."""

    def __init__(
        self, decoder: Decoder, finetune: Checkpoint, ids: Tensor, batch: int, seed: int, folder: Path
    ) -> None:
        self._decoder, self._finetune = decoder, finetune
        self._outer, self._bias = decoder.outer(finetune.tensor), decoder.head_bias(finetune.tensor)
        self._generator = torch.Generator().manual_seed(seed)
        ids = ids[: max(1, _TOKENS // ids.shape[1])]
        self._parts = torch.arange(len(ids)).split(batch)
        self._places = self._forward(ids, folder)
        self._replace_by_gradients()

    def metric(self, place: int) -> Tensor:
        """F, damped, `float32 [hidden, hidden]`, of the hidden states before block `place` (or after the last)."""
        gradients = self._places[place].flatten(0, 1)
        metric = gradients.T @ gradients / len(gradients)
        metric.diagonal().add_(_DAMPING * metric.diagonal().mean())
        return metric

    @torch.no_grad()
    def _forward(self, ids: Tensor, folder: Path) -> Tensor:
        """The hidden states at every place, `[places, windows, length, hidden]`."""
        decoder, rows = self._decoder, ids.unique()
        table = self._finetune.tensor(decoder.embedding)[rows].float()
        start = torch.cat([decoder.enter(self._outer, rows, table, ids[part]) for part in self._parts])
        places = room((len(decoder) + 1, *start.shape), folder)
        places[0] = start
        for at in range(len(decoder)):
            values = decoder.block(at, self._finetune.tensor)
            for part in self._parts:
                places[at + 1, part] = decoder.run(at, values, places[at, part])
        return places

    def _replace_by_gradients(self) -> None:
        """The gradients take the places of the hidden states, the last first."""
        decoder, places = self._decoder, self._places
        for part in self._parts:
            hidden = places[-1, part].requires_grad_()
            x = decoder.leave(self._outer, hidden)
            x.backward(self._gradient(x.detach()))
            places[-1, part] = _gradient(hidden)
        for at in reversed(range(len(decoder))):
            values = decoder.block(at, self._finetune.tensor)
            for part in self._parts:
                hidden = places[at, part].requires_grad_()
                decoder.run(at, values, hidden).backward(places[at + 1, part])
                places[at, part] = _gradient(hidden)

    def _gradient(self, x: Tensor) -> Tensor:
        """Of log p(token) by what the head sees, for a token drawn from p at every position; a few rows at a time."""
        head, tokens = self._finetune.tensor(self._decoder.head), x.shape[0] * x.shape[1]
        pieces = torch.arange(len(head)).split(max(1, _LOGITS // max(tokens, head.shape[1])))
        total, best = torch.full(x.shape[:-1], -torch.inf), torch.full(x.shape[:-1], -torch.inf)
        drawn = torch.zeros(x.shape[:-1], dtype=torch.int64)
        for rows in pieces:
            logits = self._logits(x, rows, head)
            total = torch.logaddexp(total, logits.logsumexp(-1))
            # The largest of logits with Gumbel noise is a draw from their softmax.
            noise = -torch.empty_like(logits).exponential_(generator=self._generator).log()
            most, at = (logits + noise).max(-1)
            drawn, best = torch.where(most > best, rows[at], drawn), torch.maximum(most, best)
        x = x.requires_grad_()
        for rows in pieces:
            logits = self._logits(x, rows, head)
            gradient = (drawn[..., None] == rows).float().sub_((logits.detach() - total[..., None]).exp())
            logits.backward(gradient)
        return _gradient(x)

    def _logits(self, x: Tensor, rows: Tensor, head: Tensor) -> Tensor:
        bias = None if self._bias is None else self._bias[rows]
        return self._decoder.logits(x, head[rows].float(), bias).float()


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None  # it was asked for
    return tensor.grad
