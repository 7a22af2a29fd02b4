"""How much of a fine-tune a delta keeps: NLL, KL, agreement and the recovered share, on held-out text.

    windows of tokens ── fine-tune ──┐
                      ── expert ─────┴─ NLL of each, KL(fine-tune ‖ expert), top-1 agreement
                      ── base ───────── NLL                    recovered share = (base - expert) / (base - fine-tune)

The expert is what exact arithmetic serves, base plus delta in float32 (`reference.served`), built in memory; `restore`
rounds that to the fine-tune's dtype. All models run in float32, at most two at a time. `svd` also scores a second
expert, with truncated SVDs of equal bytes in place of the quantized sites.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.compression import low_rank
from meswitch.compression.likelihood import nll_score, prediction_sums
from meswitch.delta.directory import Delta
from meswitch.delta.model import expert_model
from meswitch.errors import DataError, FormatError, NonFiniteError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.documents import read_texts
from meswitch.huggingface.models import load_model
from meswitch.huggingface.pairing import Pair, pair
from meswitch.huggingface.text import (
    FORWARD_TOKENS,
    batches,
    check_vocabulary,
    load_tokenizer,
    token_windows,
)
from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.site import QuantizedSite

_LOGITS = 2**26  # logits of one batch and model: 256 MiB
_LEAST_GAIN = 1e-6  # nats a token: what float32 leaves in doubt
_ROWS = 256  # tokens whose log-probabilities are in memory at a time


@dataclass(frozen=True)
class Score:
    """How well a model predicts the text: `nll`, the mean negative log-likelihood in nats a token."""

    nll: float

    @property
    def perplexity(self) -> float:
        """exp(NLL), infinite where that overflows."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def to_json(self) -> dict[str, float | None]:
        """`{nll, perplexity}`; an infinite perplexity is null."""
        return {"nll": self.nll, "perplexity": self.perplexity if math.isfinite(self.perplexity) else None}


@dataclass(frozen=True)
class SvdComparison:
    """The expert with a truncated SVD in place of every quantized site, in no more bytes.

    `kl`, `top1_agreement`: as in `Evaluation`. `rank`: the median over those sites, `None` if there are none. `bytes`:
    of the whole delta.
    """

    score: Score
    kl: float
    top1_agreement: float
    rank: float | None
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Scores over `tokens` scored tokens.

    `base` is `None` where the text holds tokens that the base has no row for (a grown vocabulary). `kl`:
    KL(fine-tune ‖ expert) in nats a token. `top1_agreement`: the share of tokens where fine-tune and expert find the
    same next token most likely.

    >>> Evaluation(8, Score(3.0), Score(1.0), Score(1.1), kl=0.02, top1_agreement=1.0).recovered_share
    0.95
    """

    tokens: int
    base: Score | None
    finetune: Score
    expert: Score
    kl: float
    top1_agreement: float
    svd: SvdComparison | None = None

    @property
    def gain(self) -> float | None:
        """NLL base − NLL fine-tune, in nats a token; `None` where the base has no score."""
        return None if self.base is None else self.base.nll - self.finetune.nll

    @property
    def recovered_share(self) -> float | None:
        """(NLL base − NLL expert) / (NLL base − NLL fine-tune).

        `None` where there is nothing to recover: the fine-tune predicts the text no better than the base.
        """
        return self._recovered(self.expert)

    def _recovered(self, score: Score) -> float | None:
        if self.base is None or self.gain is None or self.gain < _LEAST_GAIN:
            return None
        return (self.base.nll - score.nll) / self.gain

    def to_json(self) -> dict[str, Any]:
        """`{tokens, base, finetune, expert, recovered_share}`, and `svd` if it was scored.

        Numbers that are not defined are null.
        """
        missing = {"nll": None, "perplexity": None}
        scores: dict[str, Any] = {
            "tokens": self.tokens,
            "base": missing if self.base is None else self.base.to_json(),
            "finetune": self.finetune.to_json(),
            "expert": {**self.expert.to_json(), "kl": self.kl, "top1_agreement": self.top1_agreement},
            "recovered_share": self.recovered_share,
        }
        if self.svd is not None:
            scores["svd"] = {
                **self.svd.score.to_json(),
                "kl": self.svd.kl,
                "top1_agreement": self.svd.top1_agreement,
                "recovered_share": self._recovered(self.svd.score),
                "rank": self.svd.rank,
                "bytes": self.svd.bytes,
            }
        return scores


def evaluate(
    base: str | Path,
    delta: str | Path,
    against: str | Path,
    data: str | Path,
    *,
    baseline: str | Path | None = None,
    allow_quantized_base: bool = False,
    max_tokens: int | None = None,
    window: int = 512,
    svd: bool = False,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Scores base, fine-tune (`against`) and expert on held-out text: NLL, KL, agreement, recovered share.

    `base` and `against` are folders or hub ids, `data` a `.txt` or `.jsonl` file (see `huggingface.documents`).
    The expert is base plus delta in float32, not rounded. Text is tokenized by the fine-tune's tokenizer and cut into
    windows of `window` tokens that do not overlap; the first token of each is context only. `baseline`: the model that
    the gain is measured from instead of `base`, such as the 16-bit one of a quantized base. `allow_quantized_base`: the
    delta may be one against the 16-bit model of a quantized `base`. `max_tokens` limits the text, `svd` also scores
    truncated SVDs of equal bytes. `progress` counts tokens of all models together. Memory: two
    models in float32, and the logits of one batch.

    Raises `DataError` (fewer than two tokens, or a token that the fine-tune has no row for), `BaseMismatchError`,
    `FormatError` for a delta of another fine-tune, `CheckpointError`, `UnsupportedModelError`, `NonFiniteError` for
    logits that are not finite, and `ValueError` for a window or a limit below 2.

    >>> evaluation = evaluate("base/", "experts/math", "math/", "heldout.jsonl", window=16)
    >>> evaluation.tokens, evaluation.kl < 1, 0 <= evaluation.top1_agreement <= 1
    (40, True, True)
    """
    _check_window(window, max_tokens)
    checkpoint, finetuned = Checkpoint.open(base), Checkpoint.open(against)
    windows = _windows(data, load_tokenizer(finetuned.path), window, max_tokens)
    run = _Run(windows, progress, models=5 if svd else 3)
    with closing(Delta.open(delta)) as opened:
        opened.check_base(checkpoint, allow_quantized=allow_quantized_base)
        if opened.kind == "base":
            raise FormatError(
                f"expected a delta, found a quantized model: {opened.path}", hint="evaluate it without --against"
            )
        finetune = load_model(finetuned, torch.float32)
        finetune_score, score, kl, agreement = _compare(run, finetune, expert_model(checkpoint, opened), data)
        comparison = _compare_svd(run, opened, pair(checkpoint, finetuned), finetune, data) if svd else None
        del finetune  # before another model is loaded
    scored = checkpoint if baseline is None else Checkpoint.open(baseline)
    base_score = _score_base(run, load_model(scored, torch.float32))
    return Evaluation(run.scored, base_score, finetune_score, score, kl, agreement, comparison)


@dataclass(frozen=True)
class QuantizedEvaluation:
    """Scores of a model and of the same model quantized, over `tokens` scored tokens.

    `kl`: KL(model ‖ quantized) in nats a token. `top1_agreement`: as in `Evaluation`.
    """

    tokens: int
    model: Score
    quantized: Score
    kl: float
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        """`{tokens, model, quantized}`."""
        scores = {**self.quantized.to_json(), "kl": self.kl, "top1_agreement": self.top1_agreement}
        return {"tokens": self.tokens, "model": self.model.to_json(), "quantized": scores}


def evaluate_quantized(
    model: str | Path,
    quantized: str | Path,
    data: str | Path,
    *,
    max_tokens: int | None = None,
    window: int = 512,
    progress: ProgressCallback | None = None,
) -> QuantizedEvaluation:
    """Scores a model and what `quantize` made of it on held-out text.

    Arguments, memory and errors as in `evaluate`; `BaseMismatchError` where it was made of another model.

    >>> from meswitch import quantize
    >>> report = quantize("base/", "base-4bit")
    >>> evaluate_quantized("base/", "base-4bit", "heldout.jsonl", window=16).kl < 0.1
    True
    """
    _check_window(window, max_tokens)
    checkpoint = Checkpoint.open(model)
    run = _Run(_windows(data, load_tokenizer(checkpoint.path), window, max_tokens), progress, models=2)
    with closing(Delta.open(quantized)) as opened:
        if opened.kind != "base":
            raise FormatError(f"expected a quantized model, found a delta: {opened.path}")
        opened.check_base(checkpoint)
        scores = _compare(run, load_model(checkpoint, torch.float32), expert_model(None, opened), data)
    return QuantizedEvaluation(run.scored, *scores)


class _Run:
    """The windows of one evaluation, and its progress."""

    def __init__(self, windows: list[Tensor], progress: ProgressCallback | None, models: int) -> None:
        self.windows = windows
        self.scored = sum(len(ids) - 1 for ids in windows)
        self.meter = ProgressMeter(progress, "evaluating", models * sum(map(len, windows)))

    def batches(self, vocabulary: int) -> Iterator[Tensor]:
        """Windows `int64 [n, length]` whose logits fit in memory."""
        return batches(self.windows, min(FORWARD_TOKENS, _LOGITS // vocabulary))

    def mean(self, total: float, model: str) -> float:
        """A mean a token, from a sum. Raises `NonFiniteError`, naming the model."""
        if not math.isfinite(total):
            raise NonFiniteError(f"expected finite log-likelihoods of {model}, found {total}")
        return total / self.scored


def _check_window(window: int, max_tokens: int | None) -> None:
    if window < 2 or (max_tokens is not None and max_tokens < 2):
        raise ValueError(f"expected at least 2 tokens and a window of at least 2, found {max_tokens}, {window}")


def _windows(data: str | Path, tokenizer: Any, window: int, max_tokens: int | None) -> list[Tensor]:
    texts = read_texts(data, tokenizer)
    windows = [ids for ids in token_windows(texts, tokenizer, window, max_tokens=max_tokens) if len(ids) > 1]
    if not windows:
        raise DataError(f"expected at least two tokens of text to score, found fewer: {data}")
    return windows


def _compare(run: _Run, finetune: Any, expert: Any, data: str | Path) -> tuple[Score, Score, float, float]:
    """Scores of fine-tune and expert, run side by side, then KL and top-1 agreement."""
    totals = torch.zeros(4, dtype=torch.float64)
    vocabulary = finetune.get_input_embeddings().num_embeddings
    expert_vocabulary = expert.get_input_embeddings().num_embeddings
    if expert_vocabulary != vocabulary:
        raise FormatError(
            f"expected the fine-tune's vocabulary of {vocabulary}, found {expert_vocabulary} in the delta",
            hint="--against names another fine-tune than the one that was compressed",
        )
    for batch in run.batches(vocabulary):
        check_vocabulary(batch, vocabulary, data)
        targets = batch[:, 1:].flatten()
        finetune_logits = _logits(finetune, batch)
        run.meter.advance(batch.numel())
        expert_logits = _logits(expert, batch)
        run.meter.advance(batch.numel())
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            log_p, log_q = finetune_logits[rows].log_softmax(-1), expert_logits[rows].log_softmax(-1)
            totals += prediction_sums(log_p, log_q, targets[rows])
    names = ("the fine-tune", "the expert", "the expert against the fine-tune", "the expert")
    means = [run.mean(float(total), name) for total, name in zip(totals, names, strict=True)]
    return Score(means[0]), Score(means[1]), max(means[2], 0.0), means[3]


def _compare_svd(run: _Run, delta: Delta, paired: Pair, finetune: Any, data: str | Path) -> SvdComparison:
    """The same with a truncated SVD of equal bytes in place of every quantized site."""
    sites = delta.load()
    quantized = [site for site in sites.values() if isinstance(site, QuantizedSite)]
    svd_sites = {site.name: low_rank.svd_of_equal_bytes(site, paired.base, paired.finetune) for site in quantized}
    _, score, kl, agreement = _compare(run, finetune, expert_model(paired.base, delta, sites | svd_sites), data)
    ranks = [low_rank.rank_of_equal_bytes(site) for site in quantized]
    saved = sum(site.nbytes - svd_sites[site.name].nbytes for site in quantized)
    return SvdComparison(score, kl, agreement, statistics.median(ranks) if ranks else None, delta.nbytes - saved)


def _score_base(run: _Run, base: Any) -> Score | None:
    """The base's score; `None` if the text holds a token that it has no row for."""
    vocabulary = base.get_input_embeddings().num_embeddings
    if max(int(ids.max()) for ids in run.windows) >= vocabulary:
        return None
    total = 0.0
    for batch in run.batches(vocabulary):
        targets = batch[:, 1:].flatten()
        logits = _logits(base, batch)
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            total += float(nll_score(logits[rows].log_softmax(-1), targets[rows]))
        run.meter.advance(batch.numel())
    return Score(run.mean(total, "the base"))


@torch.inference_mode()
def _logits(model: Any, batch: Tensor) -> Tensor:
    """Predictions of every token of each window but the first: `float32 [n · (length − 1), vocabulary]`."""
    logits: Tensor = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).float()
