"""Distillation of the scales: a delta's codes stay, its row and column scales learn what the fine-tune would have said.

    text ── fine-tune (teacher) ──────────────────────────────┐
         ── base + scales · codes, rebuilt every step ────────┴─ KL(fine-tune ‖ expert) ── Adam on the scales alone

The rate falls to a tenth over the run. Text that is not trained on picks the best scales seen, the delta's own among
them, each rounded to the float16 that is stored: the outcome is never worse there than what it started from.
Joint training of row and column scales: arXiv 2512.19720; training one-bit deltas' scales at all: arXiv 2402.10193.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meswitch import reference
from meswitch.calibration import Progress, check_vocabulary, load_tokenizer, passages, read_texts, token_chunks
from meswitch.checkpoint import Checkpoint
from meswitch.compress import refuse_overwriting
from meswitch.delta import Delta, Site
from meswitch.errors import DataError, FormatError, NonFiniteError
from meswitch.evaluate import load_model, rebuild

_LOGITS = 2**26  # logits of one pass and model: 256 MiB
_HELDOUT_TOKENS = 2048  # more would cost more than it tells
_LOOKS = 8  # at the held-out text, over a run
_PASSAGE_CHARACTERS = 8192
_HEAD = "lm_head.weight"
_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16


@dataclass(frozen=True)
class Distillation:
    """What a distillation did: steps and tokens trained on, KL(fine-tune ‖ expert) in nats per held-out token."""

    steps: int
    tokens: int
    kl_before: float
    kl_after: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as they are.

        >>> Distillation(1, 1024, 0.5, 0.25, 2.0).to_json()["kl_after"]
        0.25
        """
        return asdict(self)


def distill(
    base: str | Path,
    finetune: str | Path,
    delta: str | Path,
    out: str | Path,
    data: str | Path,
    *,
    steps: int = 120,
    window: int = 128,
    batch: int = 8,
    rate: float = 0.05,
    seed: int = 0,
    heldout_share: float = 0.1,
    progress: Progress | None = None,
) -> Distillation:
    """Trains the scales of `delta` to give the fine-tune's logits on the text of `data`; writes the result to `out`.

    A step is `batch` windows of `window` tokens (forms of `data`: `calibration.read_texts`). `rate` is Adam's, on the
    logarithm of each scale. `heldout_share` of the windows, at most about 2,048 tokens, is for measuring alone. The
    same arguments give the same scales. `out` may be `delta` itself. Sites whose parameter transformers fuses with
    others when it loads them (MoE experts) keep their scales. Memory: both models in float32 and a byte a code.

    Raises `DataError` for too little text or a token without a row, `BaseMismatchError`, `FormatError` (a fine-tune
    of another shape, `out` taken by something else), `NonFiniteError`.
    """
    if steps < 1 or window < 2 or batch < 1 or not rate > 0 or not 0 < heldout_share < 1:
        raise ValueError(
            "expected at least 1 step, a window of 2, a batch of 1, a rate above 0 and a held-out share between 0 and "
            f"1, found {steps}, {window}, {batch}, {rate}, {heldout_share}"
        )
    start, tuned = time.perf_counter(), Checkpoint.open(finetune)
    refuse_overwriting(Path(out))
    train, heldout = _split(data, tuned.path, window, steps * batch, seed, heldout_share)
    with closing(Delta.open(delta)) as source:
        checkpoint = Checkpoint.open(base)
        source.check_base(checkpoint)
        run = _Run(load_model(tuned.path), rebuild(checkpoint, source), source, checkpoint, data)
        before = run.score(heldout)
        best, trained = run.train(_batches(train, batch, steps, seed), heldout, before, steps, rate, progress)
        spent = Distillation(trained, trained * len(train[:batch]) * window, before, best, time.perf_counter() - start)
        tensors, errors = _outcome(run, tuned, checkpoint) if best < before else ({}, {})
        told = {key: value for key, value in spent.to_json().items() if key != "seconds"}
        settings = source.manifest["settings"]
        settings = {**(settings if isinstance(settings, dict) else {}), "distilled": told}
        source._native.rewrite(out, tensors, errors, json.dumps(settings))
    return spent


def _split(
    data: str | Path, finetune: Path, window: int, wanted: int, seed: int, share: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Windows to train on and windows to measure on, from passages all over the text."""
    tokenizer = load_tokenizer(finetune)
    most = max(1, _HELDOUT_TOKENS // window)
    drawn = passages(read_texts(data, tokenizer), _PASSAGE_CHARACTERS, seed)
    chunks = token_chunks(drawn, tokenizer, window, max_tokens=(wanted + most) * window)
    windows = [ids for ids in chunks if len(ids) == window]
    if len(windows) < 2:
        raise DataError(
            f"expected text of at least {2 * window} tokens to distil on, found {sum(map(len, chunks))}: {data}",
            hint="give more text, or a smaller window",
        )
    kept = min(most, max(1, round(share * len(windows))))
    return windows[:-kept], windows[-kept:]


def _batches(windows: list[Tensor], size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches `int64 [size, window]`, passing over the windows in a new order each time."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    size = min(size, len(windows))
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(windows), generator=generator).tolist()
        yield torch.stack([windows[at] for at in order[:size]])
        del order[:size]


class _Levels(torch.autograd.Function):
    """`(codes − zero) · rows · columns`, keeping bytes alone for the way back.

    `codes uint8 [n, in]`, `rows [n, 1]` or `[n, in]`, `columns [in]`.
    """

    @staticmethod
    def forward(ctx: Any, codes: Tensor, zero: float, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(codes, rows, columns)
        ctx.zero = zero
        return (codes - zero).mul_(rows).mul_(columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor]:
        codes, rows, columns = ctx.saved_tensors
        product = (codes - ctx.zero).mul_(gradients[0])
        if rows.shape[1] == 1:
            return None, None, (product @ columns)[:, None], rows[:, 0] @ product
        return None, None, product * columns, (product * rows).sum(0)


class _Learner:
    """The scales of one site: what is stored, and how far (in logarithms) each has moved."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.codes = [reference.unpack(part.codes, part.bits, site.in_features) for part in site.parts]
        self.stored = {f"scales.{at}": part.scales.float() for at, part in enumerate(site.parts)}
        if site.column_scales is not None:
            self.stored["column_scales"] = site.column_scales.float()
        if site.u is not None:
            self.stored["u"] = site.u.float()
        self.moved = {role: nn.Parameter(torch.zeros_like(value)) for role, value in self.stored.items()}

    def rounded(self, role: str) -> Tensor:
        """`float16` in units of 2**exponent, what was not zero kept off zero and off infinity."""
        value = self.stored[role] * self.moved[role].detach().exp()
        size = value.abs().clamp(_SMALLEST, _LARGEST)
        return torch.where(value == 0, value, size.copysign(value)).half()

    def delta(self, rounded: bool) -> Tensor:
        """Δ̂ as `float32 [out_features, in_features]`, differentiable by `moved` unless `rounded`."""
        site, unit = self.site, 2.0**self.site.exponent

        def value(role: str) -> Tensor:
            return self.rounded(role).float() if rounded else self.stored[role] * self.moved[role].exp()

        columns = value("column_scales") if "column_scales" in self.stored else torch.ones(site.in_features)
        delta = torch.zeros(())
        for at, (part, codes) in enumerate(zip(site.parts, self.codes, strict=True)):
            rows = value(f"scales.{at}") * unit
            if rows.shape[1] > 1:
                assert part.group_size is not None
                rows = rows.repeat_interleave(part.group_size, dim=1)[:, : site.in_features]
            piece = _Levels.apply(codes, part.zero, rows, columns)
            if part.rows is not None:
                piece = torch.zeros(site.out_features, site.in_features).index_copy(0, part.rows.long(), piece)
            delta = delta + piece
        if site.u is not None and site.v is not None:
            delta = delta + (value("u") * unit) @ site.v.float()
        if site.salient is not None and site.salient_index is not None:
            delta = delta.index_add(1, site.salient_index.long(), site.salient.float() * unit)
        return delta

    def weight(self, ground: Tensor, rounded: bool) -> Tensor:
        """The model's parameter, where `ground` holds the base's rows and then those of a grown vocabulary."""
        delta = self.delta(rounded)
        delta = delta.T if self.site.transposed else delta
        if self.site.added is None:
            return ground + delta.reshape(ground.shape)
        known = self.site.out_features
        return torch.cat([ground[:known] + delta, ground[known:]])


class _Run:
    """Teacher, expert and the expert's learners, by the parameter each rebuilds."""

    def __init__(self, teacher: Any, expert: Any, delta: Delta, base: Checkpoint, data: str | Path) -> None:
        self._teacher, self._expert, self._data = teacher.eval(), expert.eval(), data
        for model in (teacher, expert):
            model.requires_grad_(False)
        vocabularies = [model.get_input_embeddings().num_embeddings for model in (teacher, expert)]
        if vocabularies[0] != vocabularies[1]:
            raise FormatError(
                f"expected the fine-tune's vocabulary of {vocabularies[0]}, found {vocabularies[1]} in the delta",
                hint="distil against the fine-tune that was compressed",
            )
        self.vocabulary: int = vocabularies[0]
        _untie(expert, delta, base)
        self.learners: dict[str, _Learner] = {}
        self._ground: dict[str, Tensor] = dict(expert.named_parameters())
        for name, site in delta.sites.items():
            here = _parameter(self._ground, name, f"{expert.base_model_prefix}.")
            if site.parts and here is not None and self._ground[here].shape == site.shape:
                self.learners[here] = _Learner(site)
                ground, start = self._ground[here], base.tensor(name).float()
                known = site.out_features if site.added is not None else ground.shape[0]
                ground.data[:known] = start[:known]

    def train(
        self,
        batches: Iterator[Tensor],
        heldout: list[Tensor],
        best: float,
        steps: int,
        rate: float,
        progress: Progress | None,
    ) -> tuple[float, int]:
        """Leaves the best scales in the learners; returns their held-out KL and the steps taken."""
        moved = [move for learner in self.learners.values() for move in learner.moved.values()]
        if not moved:
            return best, 0
        adam = torch.optim.Adam(moved, lr=rate, betas=(0.9, 0.99))
        kept = [torch.zeros_like(move) for move in moved]
        every, step = max(1, -(-steps // _LOOKS)), 0
        for step, batch in enumerate(batches, start=1):
            adam.param_groups[0]["lr"] = rate * (0.55 + 0.45 * math.cos(math.pi * (step - 1) / steps))
            adam.zero_grad()
            if not math.isfinite(self._descend(batch)):
                break
            adam.step()
            if step % every == 0 or step == steps:
                found = self.score(heldout, strict=False)
                if found < best:
                    best, kept = found, [move.detach().clone() for move in moved]
            if progress is not None:
                progress(step * batch.numel(), steps * batch.numel())
        with torch.no_grad():
            for move, keep in zip(moved, kept, strict=True):
                move.copy_(keep)
        return best, step

    def _descend(self, batch: Tensor) -> float:
        """Adds the gradients of one step; returns its KL."""
        total = 0.0
        for part in batch.split(self._windows(batch)):
            divergence = self._divergence(part, rounded=False) / batch.numel()
            divergence.backward()
            total += float(divergence.detach())
        return total

    @torch.no_grad()
    def score(self, windows: list[Tensor], *, strict: bool = True) -> float:
        """KL in nats per token, with the scales as they would be stored."""
        stacked = torch.stack(windows)
        parts = stacked.split(min(self._windows(stacked), max(1, 2048 // stacked.shape[1])))
        total = sum(float(self._divergence(part, rounded=True)) for part in parts) / stacked.numel()
        if strict and not math.isfinite(total):
            raise NonFiniteError(f"expected a finite KL of the expert against the fine-tune, found {total}")
        return max(total, 0.0) if math.isfinite(total) else math.inf

    def _windows(self, batch: Tensor) -> int:
        return max(1, _LOGITS // (self.vocabulary * batch.shape[1]))

    def _divergence(self, batch: Tensor, *, rounded: bool) -> Tensor:
        """KL(fine-tune ‖ expert), summed over the tokens of `batch`."""
        check_vocabulary(batch, self.vocabulary, self._data)
        inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch), "use_cache": False}
        with torch.no_grad():
            wanted = self._teacher(**inputs).logits.float().log_softmax(-1)
        weights = {name: learner.weight(self._ground[name], rounded) for name, learner in self.learners.items()}
        found = functional_call(self._expert, weights, kwargs=inputs).logits.float().log_softmax(-1)
        return nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)


def _untie(expert: Any, delta: Delta, base: Checkpoint) -> None:
    """A head with a site of its own is served on its own, whatever the fine-tune's config ties."""
    head, table = expert.get_output_embeddings(), expert.get_input_embeddings()
    if _HEAD in delta.sites and head is not None and head.weight is table.weight:
        site = delta.sites[_HEAD]
        weight = site.whole if site.whole is not None else site.restore(base.tensor(_HEAD))
        head.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)


def _parameter(parameters: dict[str, Tensor], name: str, prefix: str) -> str | None:
    """The model's name for a parameter of the checkpoint (GPT-2's files say `h.0…`, its model `transformer.h.0…`)."""
    return next((found for found in (name, prefix + name, name.removeprefix(prefix)) if found in parameters), None)


def _outcome(run: _Run, finetune: Checkpoint, base: Checkpoint) -> tuple[dict[str, bytes], dict[str, float]]:
    """The learned tensors as they are stored, and the relative error that each site has now."""
    tensors, errors = {}, {}
    with torch.no_grad():
        for learner in run.learners.values():
            site, known = learner.site, learner.site.out_features
            for role in learner.stored:
                tensors[f"{site.name}/{role}"] = learner.rounded(role).contiguous().numpy().tobytes()
            wanted, ground = finetune.tensor(site.name).float(), base.tensor(site.name).float()
            if site.transposed:
                wanted, ground = wanted.T, ground.T
            wanted, ground = (matrix.reshape(-1, site.in_features)[:known] for matrix in (wanted, ground))
            change = wanted - ground
            size, missed = float(change.norm()), float((change - learner.delta(rounded=True)).norm())
            errors[site.name] = missed / size if size else 0.0
    return tensors, errors
