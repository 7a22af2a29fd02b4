"""Distillation a block at a time: each block's output is matched in turn, and memory holds one block of two models.

    fine-tune:  rows of embeddings ── block 0 ─────────── block 1 ─────────── … ── head ──┐
                        │ error           │ error              │ error                    │ KL
    expert:     rows of embeddings ── block 0, tuned ──── block 1, tuned ──── … ── head ──┘

Every stage sees what the tuned stages before it make of the text, their scales rounded as they are stored. What a stage
finished is written down at once (`Journal`), and a run that was interrupted goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from meswitch.compression.distillation.descent import Recipe, descend
from meswitch.compression.distillation.fisher import Sensitivity
from meswitch.compression.distillation.heads import Heads
from meswitch.compression.distillation.hidden import Stream
from meswitch.compression.distillation.journal import Journal
from meswitch.compression.distillation.learner import Learner, Weight, learners
from meswitch.compression.distillation.windows import Windows
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import rebuild
from meswitch.huggingface.checkpoint import HEAD, Checkpoint
from meswitch.huggingface.decoder import Decoder
from meswitch.progress import ProgressCallback, ProgressMeter

_LOOKS = 4  # at the held-out text, in each stage


class Blocks:
    """The stages of one distillation, and the learners of all sites.

    Raises `UnsupportedModelError` for a model that cannot be streamed (see `Decoder`).
    """

    def __init__(
        self, base: Checkpoint, finetune: Checkpoint, delta: Delta, windows: Windows, recipe: Recipe, journal: Journal
    ) -> None:
        self._base, self._finetune, self._sites = base, finetune, delta.sites
        self._windows, self._recipe, self._journal = windows, recipe, journal
        self._decoder = decoder = Decoder(finetune.path, finetune.names())
        self._head = HEAD if decoder.head == decoder.embedding and HEAD in delta.sites else decoder.head
        self._tied = self._head == decoder.embedding
        self.learners = learners(delta.sites.values())
        self._theirs = decoder.outer(finetune.tensor)

        def rebuilt(name: str) -> Tensor:
            return rebuild(delta.sites[name], base, rounded=False)

        self._ours = decoder.outer(rebuilt)
        self._biases = decoder.head_bias(finetune.tensor), decoder.head_bias(rebuilt)
        self._ids = torch.cat([windows.train, windows.heldout])
        self._heldout = torch.arange(len(windows.train), len(self._ids))
        self._tokens = min(recipe.batch, len(windows.train)) * self._ids.shape[1]  # of a step
        self._meter = ProgressMeter(None, "distilling", 0)
        self._taken = 0

    def train(self, progress: ProgressCallback | None) -> tuple[float, float, int]:
        """Leaves the best scales in the learners; returns KL before and after, and the steps taken."""
        decoder = self._decoder
        stages = len(decoder) + (1 if self._tied else 2)
        self._meter = ProgressMeter(progress, "distilling", stages * self._recipe.steps * self._tokens)
        self._journal.begin()
        recipe = self._recipe
        self._sensitivity = Sensitivity(
            decoder, self._finetune, self._windows.train, recipe.batch, recipe.seed, self._journal.folder
        )
        untuned = learners([self._sites[self._head]]).get(self._head)
        plain = self._expert(self._windows.heldout)
        self._stage(0, [decoder.embedding], self._fit_tied if self._tied else self._fit_table)
        fine, ours = self._teacher(), self._expert(self._ids)
        for at in range(len(decoder)):
            weights = {here: self._weight(there, keep=True) for here, there in decoder.names(at).items()}
            fine.advance(at, decoder.block(at, self._finetune.tensor))
            plain.advance(at, _values(weights, rounded=True))
            fit = partial(self._fit_block, at, weights, fine, ours)
            self._stage(1 + at, list(decoder.names(at).values()), fit)
            ours.advance(at, _values(weights, rounded=True))
        theirs = fine.end(self._theirs, self._heldout)
        start = plain.end(self._ours, torch.arange(len(self._heldout)))
        before = self._compare(self._heads(untuned), theirs, start)
        heads = self._heads(self.learners.get(self._head))
        if not self._tied:
            self._stage(1 + len(decoder), [self._head], partial(self._fit_head, heads, fine, ours))
        after = self._compare(heads, theirs, ours.end(self._ours, self._heldout))
        return before, after, self._taken

    # --- streams and weights ------------------------------------------------------------------------------------------

    def _weight(self, name: str, rows: Tensor | None = None, *, keep: bool = False) -> Weight:
        return Weight(self._sites[name], self._base, self.learners.get(name), rows, keep=keep)

    def _table(self, rows: Tensor) -> Tensor:
        """Rows of the fine-tune's embedding."""
        return self._finetune.tensor(self._decoder.embedding)[rows].float()

    def _teacher(self) -> Stream:
        """The fine-tune's, of all windows, before its first block."""
        return self._stream(self._theirs, self._table, self._ids)

    def _expert(self, ids: Tensor) -> Stream:
        """The expert's, before its first block, with the scales as stored."""

        def table(rows: Tensor) -> Tensor:
            return self._weight(self._decoder.embedding, rows)(rounded=True)

        return self._stream(self._ours, table, ids)

    def _stream(self, outer: dict[str, Tensor], table: Callable[[Tensor], Tensor], ids: Tensor) -> Stream:
        batch, context, folder = self._recipe.batch, self._windows.context, self._journal.folder
        return Stream(self._decoder, outer, table, ids, batch, context, folder)

    def _heads(self, learner: Learner | None) -> Heads:
        finetune = self._finetune.tensor(self._decoder.head)
        site = self._sites[self._head]
        return Heads(self._decoder, finetune, site, self._base, learner, self._biases, self._tokens)

    def _compare(self, heads: Heads, theirs: Tensor, ours: Tensor) -> float:
        """KL in nats per held-out token of what the heads see."""
        parts = zip(theirs.split(self._tokens), ours.split(self._tokens), strict=True)
        return max(sum(heads.compare(*part) for part in parts) / len(theirs), 0.0)

    # --- stages -------------------------------------------------------------------------------------------------------

    def _stage(self, number: int, names: list[str], fit: Callable[[Callable[..., int]], int]) -> None:
        """Trains the scales of some sites, or takes them from the journal."""
        own = [self.learners[name] for name in names if name in self.learners and self.learners[name].has_codes]
        found = self._journal.load(number)
        if found is None:
            self._taken += fit(partial(self._descend, own, number)) if own else 0
            self._journal.save(number, {name: value for learner in own for name, value in learner.tensors().items()})
        else:
            self._taken += self._recipe.steps if own else 0
            for learner in own:
                learner.take(found)
        end = (number + 1) * self._recipe.steps * self._tokens
        if self._meter.done < end:  # the journal had the stage, or it ended early
            self._meter.update(end)

    def _descend(
        self, own: list[Learner], number: int, loss: Callable[[Tensor], float], score: Callable[[], float]
    ) -> int:
        recipe = self._recipe
        batches = self._windows.batches(recipe.batch, recipe.steps, recipe.seed + number)
        return descend(own, recipe, batches, loss, torch.no_grad()(score), _LOOKS, self._step)[2]

    def _step(self, numbers: Tensor) -> None:
        self._meter.advance(self._tokens)

    def _fit_table(self, descend: Callable[..., int]) -> int:
        """The embedding's rows against the fine-tune's."""
        table = self._table_error()
        return descend(lambda numbers: _backpropagate(table(rounded=False)), lambda: float(table(rounded=True)))

    def _fit_tied(self, descend: Callable[..., int]) -> int:
        """The table as embedding and as head: its rows' error, and KL on the fine-tune's own last hidden states."""
        fine, table = self._teacher(), self._table_error()
        for at in range(len(self._decoder)):
            fine.advance(at, self._decoder.block(at, self._finetune.tensor))
        heads = self._heads(self.learners[self._head])
        seen = fine.end(self._theirs, self._heldout)

        def loss(numbers: Tensor) -> float:
            x = fine.end(self._theirs, numbers)
            return _backpropagate(table(rounded=False)) + heads.descend(x, x, self._windows.following(numbers))

        return descend(loss, lambda: float(table(rounded=True)) + self._compare(heads, seen, seen))

    def _table_error(self) -> Callable[..., Tensor]:
        """How far the embedding's rows are from the fine-tune's, in nats a token: a row counts as its token occurs.

        With the scales `rounded` on the held-out text, else on the other; of rows of tokens that occur.
        """
        decoder, metric = self._decoder, self._sensitivity.metric(0)
        rows = self._ids.unique()
        weight = self._weight(decoder.embedding, rows, keep=True)
        once = rows[:, None]  # every token in a window of its own
        wanted = decoder.enter(self._theirs, rows, self._table(rows), once)
        trained, heldout = (
            torch.bincount(torch.searchsorted(rows, ids).flatten(), minlength=len(rows)) / ids.numel()
            for ids in (self._windows.train, self._windows.heldout)
        )

        def error(*, rounded: bool) -> Tensor:
            missed = decoder.enter(self._ours, rows, weight(rounded), once) - wanted
            return (heldout if rounded else trained) @ _nats(missed[:, 0], metric)

        return error

    def _fit_block(
        self, at: int, weights: dict[str, Weight], fine: Stream, ours: Stream, descend: Callable[..., int]
    ) -> int:
        """A block's output against the fine-tune's, on what the tuned blocks before it make of the text."""
        metric = self._sensitivity.metric(at + 1)

        def error(numbers: Tensor, values: dict[str, Tensor]) -> Tensor:
            missed = self._decoder.run(at, values, ours.hidden[numbers]) - fine.hidden[numbers]
            return _nats(missed, metric)[:, self._windows.context :].mean()

        def loss(numbers: Tensor) -> float:
            return _backpropagate(error(numbers, _values(weights, rounded=False)))

        def score() -> float:
            values, parts = _values(weights, rounded=True), self._heldout.split(self._recipe.batch)
            return sum(float(error(part, values)) * len(part) for part in parts) / len(self._heldout)

        return descend(loss, score)

    def _fit_head(self, heads: Heads, fine: Stream, ours: Stream, descend: Callable[..., int]) -> int:
        """The head's logits by KL, on what the tuned blocks make of the text."""
        seen = fine.end(self._theirs, self._heldout), ours.end(self._ours, self._heldout)

        def loss(numbers: Tensor) -> float:
            x, y = fine.end(self._theirs, numbers), ours.end(self._ours, numbers)
            return heads.descend(x, y, self._windows.following(numbers))

        return descend(loss, lambda: self._compare(heads, *seen))


def _nats(missed: Tensor, metric: Tensor) -> Tensor:
    """What an error of hidden states costs, `[…]` of `missed […, hidden]`."""
    return 0.5 * ((missed @ metric) * missed).sum(-1)


def _values(weights: dict[str, Weight], *, rounded: bool) -> dict[str, Tensor]:
    return {name: weight(rounded) for name, weight in weights.items()}


def _backpropagate(loss: Tensor) -> float:
    loss.backward()
    return float(loss.detach())
