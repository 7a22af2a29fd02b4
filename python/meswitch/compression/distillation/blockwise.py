"""Distillation one block after the other: memory holds one block of two models, and the hidden states of the text.

    fine-tune:  embedding rows ──── block 0 ─────────── block 1 ─────────── … ── head ──┐
                     │ error           │ error              │ error                     │ KL
    expert:     embedding rows ──── block 0, tuned ──── block 1, tuned ──── … ── head ──┘

Every block is a *stage*, and so are the embedding before and the head after them (one stage where the two are tied). A
stage is trained on what the tuned stages before it make of the text, with their scales rounded as they are stored. A
finished stage is written to the journal at once, and an interrupted run goes on after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from meswitch.compression.distillation.expert_weight import ExpertWeight, StackedWeight, Weight
from meswitch.compression.distillation.fisher_information import FisherInformation
from meswitch.compression.distillation.head_divergence import HeadDivergence
from meswitch.compression.distillation.hidden_states import HiddenStates
from meswitch.compression.distillation.journal import Journal
from meswitch.compression.distillation.optimizer import Outcome, Schedule, optimize
from meswitch.compression.distillation.scales import TrainableScales, trainable_scales
from meswitch.compression.distillation.windows import Windows
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import rebuild
from meswitch.huggingface.checkpoint import HEAD, Checkpoint
from meswitch.huggingface.decoder import Decoder
from meswitch.progress import ProgressCallback, ProgressMeter

_EVALUATIONS = 4  # of the held-out text, in each stage


@dataclass(frozen=True)
class _Objective:
    """What a stage minimises.

    `loss` adds the gradients on the training windows with the given numbers and returns its value. `score` is the same
    on held-out text, with the scales as stored.
    """

    loss: Callable[[Tensor], float]
    score: Callable[[], float]


class BlockwiseDistillation:
    """The stages of one distillation.

    `scales`: the scales of every site that has a delta, by the site's name; those without codes are not trained.
    Raises `UnsupportedModelError` for a model that cannot be run a block at a time (see `Decoder`).
    """

    def __init__(
        self,
        base: Checkpoint,
        finetune: Checkpoint,
        delta: Delta,
        windows: Windows,
        schedule: Schedule,
        journal: Journal,
    ) -> None:
        self._base, self._finetune, self._sites = base, finetune, delta.load()
        self._windows, self._schedule, self._journal = windows, schedule, journal
        self._decoder = decoder = Decoder(finetune.path, finetune.names())
        self._head = HEAD if decoder.head == decoder.embedding and HEAD in self._sites else decoder.head
        self._tied = self._head == decoder.embedding
        self.scales = trainable_scales(self._sites.values())

        def rebuilt(name: str) -> Tensor:
            return rebuild(delta.sites[name], base, rounded=False)

        self._finetune_outer, self._expert_outer = (decoder.outer_parameters(w) for w in (finetune.tensor, rebuilt))
        self._head_biases = decoder.head_bias(finetune.tensor), decoder.head_bias(rebuilt)
        self._ids = torch.cat([windows.train, windows.heldout])
        self._heldout = torch.arange(len(windows.train), len(self._ids))  # numbers of windows in `_ids`
        self._tokens_per_step = min(schedule.batch, len(windows.train)) * self._ids.shape[1]
        self._meter = ProgressMeter(None, "distilling", 0)
        self._steps_taken = 0

    def train(self, progress: ProgressCallback | None) -> Outcome:
        """Trains the scales and leaves the best ones in `self.scales`; scores are KL in nats a held-out token."""
        decoder, schedule = self._decoder, self._schedule
        stages = len(decoder) + (1 if self._tied else 2)
        self._meter = ProgressMeter(progress, "distilling", stages * schedule.steps * self._tokens_per_step)
        self._journal.open()
        train, folder = self._windows.train, self._journal.folder
        self._fisher = FisherInformation(decoder, self._finetune, train, schedule.batch, schedule.seed, folder)
        untuned_head = trainable_scales([self._sites[self._head]]).get(self._head)
        untuned = self._expert_states(self._windows.heldout)
        self._train_stage(0, [decoder.embedding], self._tied_objective if self._tied else self._embedding_objective)
        teacher, tuned = self._teacher_states(), self._expert_states(self._ids)
        for block in range(len(decoder)):
            self._train_block(block, teacher, tuned, untuned)
        teacher_inputs = teacher.head_inputs(self._heldout)
        untuned_inputs = untuned.head_inputs(torch.arange(len(self._heldout)))
        before = self._mean_divergence(self._head_divergence(untuned_head), teacher_inputs, untuned_inputs)
        heads = self._head_divergence(self.scales.get(self._head))
        if not self._tied:
            self._train_stage(1 + len(decoder), [self._head], partial(self._head_objective, heads, teacher, tuned))
        after = self._mean_divergence(heads, teacher_inputs, tuned.head_inputs(self._heldout))
        return Outcome(before, after, self._steps_taken)

    # --- models -------------------------------------------------------------------------------------------------------

    def _weight(self, name: str, rows: Tensor | None = None, *, keep_base: bool = False) -> ExpertWeight:
        return ExpertWeight(self._sites[name], self._base, self.scales.get(name), rows, keep_base=keep_base)

    def _teacher_rows(self, tokens: Tensor) -> Tensor:
        """The fine-tune's embedding of `tokens int64 [n]`."""
        return self._finetune.tensor(self._decoder.embedding)[tokens].float()

    def _expert_rows(self, tokens: Tensor) -> Tensor:
        """The expert's embedding of `tokens int64 [n]`, with the scales as stored."""
        return self._weight(self._decoder.embedding, tokens)(rounded=True)

    def _teacher_states(self) -> HiddenStates:
        """The fine-tune's, of all windows, before the first block."""
        return self._hidden_states(self._finetune_outer, self._teacher_rows, self._ids)

    def _expert_states(self, ids: Tensor) -> HiddenStates:
        """The expert's, before the first block, with the scales as stored."""
        return self._hidden_states(self._expert_outer, self._expert_rows, ids)

    def _hidden_states(
        self, outer: dict[str, Tensor], embedding_rows: Callable[[Tensor], Tensor], ids: Tensor
    ) -> HiddenStates:
        batch, context, folder = self._schedule.batch, self._windows.context, self._journal.folder
        return HiddenStates(self._decoder, outer, embedding_rows, ids, batch, context, folder)

    def _head_divergence(self, scales: TrainableScales | None) -> HeadDivergence:
        finetune = self._finetune.tensor(self._decoder.head)
        site, tokens = self._sites[self._head], self._tokens_per_step
        return HeadDivergence(self._decoder, finetune, site, self._base, scales, self._head_biases, tokens)

    def _mean_divergence(self, heads: HeadDivergence, teacher_inputs: Tensor, expert_inputs: Tensor) -> float:
        """KL in nats a token, of inputs of the heads `[tokens, width]`."""
        size = self._tokens_per_step
        batches = zip(teacher_inputs.split(size), expert_inputs.split(size), strict=True)
        return max(sum(heads.score(*batch) for batch in batches) / len(teacher_inputs), 0.0)

    # --- stages -------------------------------------------------------------------------------------------------------

    def _train_block(self, block: int, teacher: HiddenStates, tuned: HiddenStates, untuned: HiddenStates) -> None:
        """Trains a block and moves all hidden states through it."""
        decoder = self._decoder
        weights, names = self._block_weights(block)
        teacher.advance(block, decoder.block_parameters(block, self._finetune.tensor))
        untuned.advance(block, _parameters(weights, rounded=True))
        objective = partial(self._block_objective, block, weights, tuned.values, teacher.values)
        self._train_stage(1 + block, names, objective)
        tuned.advance(block, _parameters(weights, rounded=True))

    def _block_weights(self, block: int) -> tuple[dict[str, Weight], list[str]]:
        """A block's parameters, and all of its sites."""
        decoder, weights, names = self._decoder, dict[str, Weight](), list[str]()
        for parameter, name in decoder.block_names(block).items():
            weights[parameter] = self._weight(name, keep_base=True)
            names.append(name)
        for parameter, moe_experts in decoder.block_stacks(block).items():
            own = [name for tensors in moe_experts for name in tensors]
            shape = decoder.block_module(block).get_parameter(parameter).shape
            weights[parameter] = StackedWeight([self._weight(name) for name in own], shape)
            names += own
        return weights, names

    def _train_stage(self, number: int, names: list[str], objective: Callable[[], _Objective]) -> None:
        """Trains the scales of some sites, or takes them from the journal."""
        sites = [self.scales[name] for name in names if name in self.scales and self.scales[name].has_codes]
        finished = self._journal.load(number)
        if finished is None:
            self._steps_taken += self._optimize(sites, number, objective()) if sites else 0
            self._journal.save(number, {name: value for scales in sites for name, value in scales.tensors().items()})
        else:
            self._steps_taken += self._schedule.steps if sites else 0
            for scales in sites:
                scales.load(finished)
        end = (number + 1) * self._schedule.steps * self._tokens_per_step
        if self._meter.done < end:  # the journal had the stage, or its training ended early
            self._meter.update(end)

    def _optimize(self, sites: list[TrainableScales], number: int, objective: _Objective) -> int:
        """The number of steps taken."""
        schedule = self._schedule
        batches = self._windows.batches(schedule.batch, schedule.steps, schedule.seed + number)
        score = torch.no_grad()(objective.score)
        return optimize(sites, schedule, batches, objective.loss, score, _EVALUATIONS, self._count_step).steps

    def _count_step(self, numbers: Tensor) -> None:
        self._meter.advance(self._tokens_per_step)

    # --- objectives ---------------------------------------------------------------------------------------------------

    def _embedding_objective(self) -> _Objective:
        """The embedding's rows match the fine-tune's."""
        error = self._embedding_error()
        return _Objective(lambda numbers: _backpropagate(error(rounded=False)), lambda: float(error(rounded=True)))

    def _tied_objective(self) -> _Objective:
        """The rows match as an embedding, and as a head by KL on the fine-tune's own last hidden states."""
        teacher, error = self._teacher_states(), self._embedding_error()
        for block in range(len(self._decoder)):
            teacher.advance(block, self._decoder.block_parameters(block, self._finetune.tensor))
        heads = self._head_divergence(self.scales[self._head])
        heldout = teacher.head_inputs(self._heldout)

        def loss(numbers: Tensor) -> float:
            x = teacher.head_inputs(numbers)
            kl = _backpropagate(error(rounded=False))
            return kl + heads.add_gradients(x, x, self._windows.next_tokens(numbers))

        return _Objective(loss, lambda: float(error(rounded=True)) + self._mean_divergence(heads, heldout, heldout))

    def _embedding_error(self) -> Callable[..., Tensor]:
        """The cost of the embedding's errors in nats a token: a row counts as often as its token occurs.

        The returned function takes `rounded`: with the scales as stored on held-out text, else on the training text.
        """
        decoder, fisher = self._decoder, self._fisher.before_block(0)
        tokens = self._ids.unique()
        weight = self._weight(decoder.embedding, tokens, keep_base=True)
        windows = tokens[:, None]  # every token in a window of its own
        target = decoder.embed(self._finetune_outer, tokens, self._teacher_rows(tokens), windows)
        train_shares, heldout_shares = (
            torch.bincount(torch.searchsorted(tokens, ids).flatten(), minlength=len(tokens)) / ids.numel()
            for ids in (self._windows.train, self._windows.heldout)
        )

        def error(*, rounded: bool) -> Tensor:
            difference = decoder.embed(self._expert_outer, tokens, weight(rounded=rounded), windows) - target
            return (heldout_shares if rounded else train_shares) @ _cost(difference[:, 0], fisher)

        return error

    def _block_objective(self, block: int, weights: dict[str, Weight], before: Tensor, target: Tensor) -> _Objective:
        """A block's output matches the fine-tune's (`target`), from what the tuned blocks made of the text (`before`).

        Both `float32 [windows, length, hidden]`.
        """
        fisher = self._fisher.before_block(block + 1)

        def error(numbers: Tensor, parameters: dict[str, Tensor]) -> Tensor:
            difference = self._decoder.run_block(block, parameters, before[numbers]) - target[numbers]
            return _cost(difference, fisher)[:, self._windows.context :].mean()

        def loss(numbers: Tensor) -> float:
            return _backpropagate(error(numbers, _parameters(weights, rounded=False)))

        def score() -> float:
            parameters, batches = _parameters(weights, rounded=True), self._heldout.split(self._schedule.batch)
            return sum(float(error(batch, parameters)) * len(batch) for batch in batches) / len(self._heldout)

        return _Objective(loss, score)

    def _head_objective(self, heads: HeadDivergence, teacher: HiddenStates, tuned: HiddenStates) -> _Objective:
        """The head's logits match by KL, from what the tuned blocks made of the text."""
        heldout = teacher.head_inputs(self._heldout), tuned.head_inputs(self._heldout)

        def loss(numbers: Tensor) -> float:
            x, y = teacher.head_inputs(numbers), tuned.head_inputs(numbers)
            return heads.add_gradients(x, y, self._windows.next_tokens(numbers))

        return _Objective(loss, lambda: self._mean_divergence(heads, *heldout))


def _cost(error: Tensor, fisher: Tensor) -> Tensor:
    """½ eᵀ F e in nats, `[…]`, of errors of hidden states `[…, hidden]`."""
    return 0.5 * ((error @ fisher) * error).sum(-1)


def _parameters(weights: dict[str, Weight], *, rounded: bool) -> dict[str, Tensor]:
    return {name: weight(rounded=rounded) for name, weight in weights.items()}


def _backpropagate(loss: Tensor) -> float:
    """Adds the gradients of a loss; returns its value."""
    loss.backward()
    return float(loss.detach())
