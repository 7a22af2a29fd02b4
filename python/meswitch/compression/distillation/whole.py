"""Distillation of a whole model at once: KL(fine-tune ‖ expert) on logits, by the scales of every site together.

text ─┬─ fine-tune (teacher) ─────────────────────────────┐
      ├─ base + scales · codes, rebuilt every step ───────┼─ KL(fine-tune ‖ expert) ── Adam on the scales alone
      └─ the token that comes next ───────────────────────┘   + 0.2 √KL · its NLL
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meswitch.compression.distillation.descent import Recipe, descend
from meswitch.compression.distillation.learner import Learner, Weight, learners
from meswitch.compression.distillation.windows import Windows, text_weight
from meswitch.compression.likelihood import kl_sum, nll_sum
from meswitch.delta.directory import Delta
from meswitch.delta.model import expert_model
from meswitch.delta.restoration import rebuild
from meswitch.huggingface.checkpoint import HEAD, Checkpoint
from meswitch.huggingface.models import load_model
from meswitch.huggingface.names import spellings
from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.site import QuantizedSite

_LOGITS = 2**26  # logits of one pass and model: 256 MiB
_LOOKS = 8  # at the held-out text, over a run


class Whole:
    """Teacher, expert and the expert's weights, by the parameter each rebuilds."""

    def __init__(self, base: Checkpoint, finetune: Checkpoint, delta: Delta, windows: Windows, recipe: Recipe) -> None:
        self._teacher, self._expert = load_model(finetune.path, torch.float32), expert_model(base, delta)
        self._windows, self._recipe = windows, recipe
        for model in (self._teacher, self._expert):
            model.eval().requires_grad_(False)
        self._vocabulary: int = self._teacher.get_input_embeddings().num_embeddings
        _untie(self._expert, delta, base)
        self.learners: dict[str, Learner] = {}
        self._weights: dict[str, Weight] = {}
        parameters = dict(self._expert.named_parameters())
        for name, learner in learners(
            site for site in delta.sites.values() if isinstance(site, QuantizedSite) and site.parts
        ).items():
            here = next((own for own in spellings(name, self._expert.base_model_prefix) if own in parameters), None)
            if here is not None and parameters[here].shape == learner.site.shape:
                self.learners[name] = learner
                self._weights[here] = Weight(learner.site, base, learner, keep=True)
                parameters[here].data = self._weights[here].ground  # one copy of it is enough

    def train(self, progress: ProgressCallback | None) -> tuple[float, float, int]:
        """Leaves the best scales in the learners; returns KL before and after, and the steps taken."""
        recipe, train = self._recipe, self._windows.train
        total = recipe.steps * min(recipe.batch, len(train)) * train.shape[1]
        meter = ProgressMeter(progress, "distilling", total)

        def report(numbers: Tensor) -> None:
            meter.advance(len(numbers) * train.shape[1])

        batches, own = self._windows.batches(recipe.batch, recipe.steps, recipe.seed), list(self.learners.values())
        return descend(own, recipe, batches, self._descend, self._score, _LOOKS, report)

    def _descend(self, numbers: Tensor) -> float:
        """Adds the gradients of one step; returns its KL alone."""
        windows, total = self._windows, 0.0
        asked = len(numbers) * windows.asked
        for some in numbers.split(self._most(windows.train)):
            wanted, found = self._answers(windows.train[some], rounded=False)
            divergence = kl_sum(wanted, found)
            unlikely = nll_sum(found, windows.following(some))
            weight = text_weight(float(divergence.detach()) / len(found))
            ((divergence + weight * unlikely) / asked).backward()
            total += float(divergence.detach()) / asked
        return total

    @torch.no_grad()
    def _score(self) -> float:
        """KL in nats per held-out token, with the scales as stored."""
        heldout = self._windows.heldout
        parts = heldout.split(min(self._most(heldout), max(1, 2048 // heldout.shape[1])))
        found = sum(float(kl_sum(*self._answers(part, rounded=True))) for part in parts)
        return max(found / (len(heldout) * self._windows.asked), 0.0)

    def _most(self, batch: Tensor) -> int:
        return max(1, _LOGITS // (self._vocabulary * batch.shape[1]))

    def _answers(self, batch: Tensor, *, rounded: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities `[tokens that count, vocabulary]` of fine-tune and expert."""
        asked = slice(self._windows.context, None)
        inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch), "use_cache": False}
        with torch.no_grad():
            wanted = self._teacher(**inputs).logits[:, asked].flatten(0, 1).float().log_softmax(-1)
        weights = {name: weight(rounded) for name, weight in self._weights.items()}
        logits = functional_call(self._expert, weights, kwargs=inputs).logits[:, asked]
        return wanted, logits.flatten(0, 1).float().log_softmax(-1)


def _untie(expert: Any, delta: Delta, base: Checkpoint) -> None:
    """A head with a site of its own is served on its own, whatever the fine-tune's config ties."""
    head, table = expert.get_output_embeddings(), expert.get_input_embeddings()
    if HEAD in delta.sites and head is not None and head.weight is table.weight:
        weight = rebuild(delta.sites[HEAD], base, rounded=False).to(torch.float32, copy=True)
        head.weight = nn.Parameter(weight, requires_grad=False)
