"""Training of the families: batches from streams of tokens, AdamW, and the files that a family consists of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from meswitch.kernels.processor import multiplies_bfloat16
from meswitch.progress import ProgressMeter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Training:
    """How a model is trained: phases of (window in tokens, windows a step, steps), and the settings of AdamW.

    The field names count: a family's folder is named by a hash of them (`family.family`).
    """

    phases: tuple[tuple[int, int, int], ...]
    rate: float  # AdamW's highest
    embedding: float  # how much faster the embedding learns: few of its rows have a gradient in a step
    decay: float = 0.0  # weight decay of matrices
    mixed: bool = False  # products in bfloat16, where the processor has them; parameters stay float32

    @property
    def steps(self) -> int:
        """Of all phases together."""
        return sum(steps for _, _, steps in self.phases)


def batches(
    streams: dict[str, IntArray], shares: tuple[float, ...], training: Training, rng: np.random.Generator
) -> Iterator[IntArray]:
    """Batches `int64 [rows, window + 1]`, each row from a random place of a stream chosen by its share."""
    texts = list(streams.values())
    share = np.array(shares) / sum(shares)
    for window, rows, steps in training.phases:
        for _ in range(steps):
            chosen = (texts[k] for k in rng.choice(len(texts), size=rows, p=share))
            starts = ((text, rng.integers(len(text) - window)) for text in chosen)
            yield np.stack([text[start : start + window + 1] for text, start in starts])


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A `.jsonl` file of these objects, in a folder that is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the checkpoint; the model is bfloat16 from here on."""
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model: Any, data: Iterator[IntArray], training: Training, meter: ProgressMeter) -> None:
    """AdamW over the batches of `data`, in place: a short warm-up, then a cosine to a tenth.

    A config with a `router_aux_loss_coef` has that much of `balance_loss` added.
    """
    meter.update(0)
    balance = getattr(model.config, "router_aux_loss_coef", 0.0)
    recorded = {"output_router_logits": True} if balance else {}
    optimizer = _optimizer(model, training)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step, batch in enumerate(data):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _schedule(step, training.steps)
        ids = torch.from_numpy(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=training.mixed and multiplies_bfloat16()):
            output = model(input_ids=ids[:, :-1], use_cache=False, **recorded)
        loss = cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten())
        if balance:
            loss = loss + balance * balance_loss(output.router_logits, model.config.num_experts_per_tok)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.advance(1)
    model.eval()


def balance_loss(gate_logits: Sequence[Tensor], chosen: int) -> Tensor:
    """What keeps every MoE expert in use (arXiv 2101.03961, section 2.2), as a mean over layers: 1 where all are alike.

    `gate_logits`: `[tokens, MoE experts]` of each layer, of which the `chosen` largest of a token are taken. Layers are
    counted one by one; transformers adds their counts up, which lets one layer make up for another.
    """
    losses = []
    for logits in gate_logits:
        tokens, count = logits.shape
        taken = torch.bincount(logits.topk(chosen).indices.flatten(), minlength=count) / (tokens * chosen)
        losses.append(count * (taken * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def _optimizer(model: Any, training: Training) -> torch.optim.Optimizer:
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.dim() > 1 and p is not embedding]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": training.decay},
        {"params": [embedding], "lr": training.rate * training.embedding},
        {"params": vectors},
    ]
    return torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _schedule(step: int, steps: int) -> float:
    """The share of the full rate at this step."""
    return min(1.0, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
