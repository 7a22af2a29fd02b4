"""Distillation of all sites at once: KL(fine-tune ‖ expert) on the logits of the whole model.

text ─┬─ fine-tune (teacher) ─────────────────────────────┐
      ├─ base + scales · codes, rebuilt every step ───────┼─ KL(fine-tune ‖ expert) ── Adam on the scales alone
      └─ next tokens ─────────────────────────────────────┘   + 0.2 √KL · NLL
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meswitch.compression.distillation.expert_weight import ExpertWeight, StackedWeight, Weight
from meswitch.compression.distillation.optimizer import Outcome, Schedule, optimize
from meswitch.compression.distillation.scales import TrainableScales, trainable_scales
from meswitch.compression.distillation.windows import Windows, text_weight
from meswitch.compression.likelihood import kl_sum, nll_sum
from meswitch.delta.directory import Delta
from meswitch.delta.model import expert_model
from meswitch.delta.restoration import rebuild
from meswitch.huggingface.checkpoint import HEAD, Checkpoint
from meswitch.huggingface.models import load_model
from meswitch.huggingface.names import ParameterNames
from meswitch.huggingface.text import FORWARD_TOKENS
from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.site import QuantizedSite

_LOGITS = 2**26  # logits of one pass and model: 256 MiB
_EVALUATIONS = 8  # of the held-out text, over a run


class WholeModelDistillation:
    """Both models in float32, and the expert's weights by the parameter that each of them replaces.

    `scales`: the scales of every site that is trained, by the site's name.
    """

    def __init__(
        self, base: Checkpoint, finetune: Checkpoint, delta: Delta, windows: Windows, schedule: Schedule
    ) -> None:
        self._teacher, self._expert = load_model(finetune, torch.float32), expert_model(base, delta)
        self._windows, self._schedule = windows, schedule
        for model in (self._teacher, self._expert):
            model.eval().requires_grad_(False)
        self._vocabulary: int = self._teacher.get_input_embeddings().num_embeddings
        _untie_head(self._expert, delta, base)
        self.scales: dict[str, TrainableScales] = {}
        self._weights: dict[str, Weight] = {}
        parameters, sites = dict(self._expert.named_parameters()), delta.sites
        quantized = (site for site in sites.values() if isinstance(site, QuantizedSite) and site.parts)
        trainable = trainable_scales(quantized)
        for parameter, names in _names(self._expert, sites).items():
            own = {name: trainable[name] for name in names if name in trainable}
            pieces = [ExpertWeight(sites[name], base, own.get(name), keep_base=len(names) == 1) for name in names]
            weight = pieces[0] if len(names) == 1 else StackedWeight(pieces, parameters[parameter].shape)
            if own and weight.base.shape == parameters[parameter].shape:
                self.scales |= own
                self._weights[parameter] = weight
                parameters[parameter].data = weight.base  # saves a second copy of it

    def train(self, progress: ProgressCallback | None) -> Outcome:
        """Trains the scales and leaves the best ones in `self.scales`; scores are KL in nats a held-out token."""
        schedule, train = self._schedule, self._windows.train
        total = schedule.steps * min(schedule.batch, len(train)) * train.shape[1]
        meter = ProgressMeter(progress, "distilling", total)

        def report(numbers: Tensor) -> None:
            meter.advance(len(numbers) * train.shape[1])

        batches = self._windows.batches(schedule.batch, schedule.steps, schedule.seed)
        sites = list(self.scales.values())
        return optimize(sites, schedule, batches, self._add_gradients, self._score, _EVALUATIONS, report)

    def _add_gradients(self, numbers: Tensor) -> float:
        """Adds the gradients of the loss on the training windows `numbers`; returns its KL part."""
        windows, total = self._windows, 0.0
        scored = len(numbers) * windows.scored
        for piece in numbers.split(self._windows_per_pass(windows.train)):
            log_p, log_q = self._log_probabilities(windows.train[piece], rounded=False)
            kl, nll = kl_sum(log_p, log_q), nll_sum(log_q, windows.next_tokens(piece))
            weight = text_weight(float(kl.detach()) / len(log_q))
            ((kl + weight * nll) / scored).backward()
            total += float(kl.detach()) / scored
        return total

    @torch.no_grad()
    def _score(self) -> float:
        """KL in nats a held-out token, with the scales as stored."""
        heldout = self._windows.heldout
        count = min(self._windows_per_pass(heldout), max(1, FORWARD_TOKENS // heldout.shape[1]))
        total = sum(float(kl_sum(*self._log_probabilities(ids, rounded=True))) for ids in heldout.split(count))
        return max(total / (len(heldout) * self._windows.scored), 0.0)

    def _windows_per_pass(self, windows: Tensor) -> int:
        return max(1, _LOGITS // (self._vocabulary * windows.shape[1]))

    def _log_probabilities(self, ids: Tensor, *, rounded: bool) -> tuple[Tensor, Tensor]:
        """Of fine-tune and expert for the scored tokens: `float32 [tokens, vocabulary]` each."""
        scored = slice(self._windows.context, None)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with torch.no_grad():
            log_p = self._teacher(**inputs).logits[:, scored].flatten(0, 1).float().log_softmax(-1)
        weights = {name: weight(rounded=rounded) for name, weight in self._weights.items()}
        logits = functional_call(self._expert, weights, kwargs=inputs).logits[:, scored]
        return log_p, logits.flatten(0, 1).float().log_softmax(-1)


def _names(model: Any, sites: Iterable[str]) -> dict[str, list[str]]:
    """The sites of each parameter of a model: its own, or those that are stacked in it, in their order."""
    names, sites = ParameterNames(model), list(sites)
    own = {parameter: [name] for parameter, name in names.on_disk(sites).items()}
    stacks = names.moe_experts(sites).items()
    return own | {parameter: [name for tensors in moe_experts for name in tensors] for parameter, moe_experts in stacks}


def _untie_head(expert: Any, delta: Delta, base: Checkpoint) -> None:
    """Gives the head a weight of its own if it has a site of its own, even where the fine-tune's config ties it."""
    head, embedding = expert.get_output_embeddings(), expert.get_input_embeddings()
    if HEAD in delta.sites and head is not None and head.weight is embedding.weight:
        weight = rebuild(delta.sites[HEAD], base, rounded=False).to(torch.float32, copy=True)
        head.weight = nn.Parameter(weight, requires_grad=False)
