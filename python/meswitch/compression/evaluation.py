"""How much of a fine-tune a delta keeps: NLL, KL, agreement and the recovered share, on held-out text.

    windows of tokens ── fine-tune ──┐
                      ── expert ─────┴─ NLL of each, KL(fine-tune ‖ expert), top-1 agreement
                      ── base ───────── NLL                    recovered share = (base - expert) / (base - fine-tune)

The expert is what the engine serves, base and delta added in float32 (`reference.served`) and built in memory;
`restore` rounds that to the fine-tune's dtype. All models run in float32, at most two of them at a time. Asked for, a
second expert takes the first one's place, whose quantized sites are truncated SVDs of equal bytes instead.
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
from meswitch.compression.likelihood import nll_sum, prediction_sums
from meswitch.delta.directory import Delta
from meswitch.delta.model import expert_model
from meswitch.errors import DataError, FormatError, NonFiniteError
from meswitch.huggingface.checkpoint import Checkpoint, resolve
from meswitch.huggingface.models import load_model
from meswitch.huggingface.text import (
    FORWARD_TOKENS,
    batches,
    check_vocabulary,
    load_tokenizer,
    read_texts,
    token_windows,
)
from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.site import QuantizedSite

_LOGITS = 2**26  # logits of one batch and model: 256 MiB
_ROWS = 256  # tokens whose log-probabilities are held at a time


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood, nats per token."""

    nll: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def to_json(self) -> dict[str, float | None]:
        return {"nll": self.nll, "perplexity": self.perplexity if math.isfinite(self.perplexity) else None}


@dataclass(frozen=True)
class Svd:
    """What the delta would be with a truncated SVD in place of every quantized site, in no more bytes.

    `rank` is the median over those sites (none where there are none), `bytes` what the delta would weigh.
    """

    score: Score
    kl: float
    top1_agreement: float
    rank: float | None
    bytes: int


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found over `tokens` scored tokens.

    `base` is none where the data holds tokens the base has no row for (a grown vocabulary): its likelihood is not
    defined there. `kl` is KL(fine-tune ‖ expert) in nats per token, `top1_agreement` a fraction.

    >>> Evaluation(8, Score(3.0), Score(1.0), Score(1.1), kl=0.02, top1_agreement=1.0).recovered_share
    0.95
    """

    tokens: int
    base: Score | None
    finetune: Score
    expert: Score
    kl: float
    top1_agreement: float
    svd: Svd | None = None

    @property
    def recovered_share(self) -> float | None:
        """(NLL base - NLL expert) / (NLL base - NLL fine-tune); none where there is nothing to recover."""
        return self._recovered(self.expert)

    def _recovered(self, score: Score) -> float | None:
        if self.base is None or self.base.nll == self.finetune.nll:
            return None
        return (self.base.nll - score.nll) / (self.base.nll - self.finetune.nll)

    def to_json(self) -> dict[str, Any]:
        """`{tokens, base, finetune, expert, recovered_share}`, and `svd` where asked for; null where a number is not
        defined."""
        missing = {"nll": None, "perplexity": None}
        found: dict[str, Any] = {
            "tokens": self.tokens,
            "base": missing if self.base is None else self.base.to_json(),
            "finetune": self.finetune.to_json(),
            "expert": {**self.expert.to_json(), "kl": self.kl, "top1_agreement": self.top1_agreement},
            "recovered_share": self.recovered_share,
        }
        if self.svd is not None:
            found["svd"] = {
                **self.svd.score.to_json(),
                "kl": self.svd.kl,
                "top1_agreement": self.svd.top1_agreement,
                "recovered_share": self._recovered(self.svd.score),
                "rank": self.svd.rank,
                "bytes": self.svd.bytes,
            }
        return found


def evaluate(
    base: str | Path,
    delta_path: str | Path,
    against: str | Path,
    data: str | Path,
    *,
    max_tokens: int | None = None,
    window: int = 512,
    svd: bool = False,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Score base, fine-tune (`against`) and delta on the text of `data` (forms: `huggingface.text.read_texts`).

    The delta is scored as exact arithmetic serves it: added to the base in float32, not rounded. Tokens are the
    fine-tune's tokenizer's, in windows of `window` that do not overlap; the first of each is context only. `svd` also
    scores what truncated SVDs of equal bytes would keep. `progress` is told of the tokens run, all models together.

    Raises `DataError` (no two tokens, a token without a row), `BaseMismatchError`, `FormatError`, `NonFiniteError`.
    """
    if window < 2 or (max_tokens is not None and max_tokens < 2):
        raise ValueError(f"expected at least 2 tokens and a window of at least 2, found {max_tokens}, {window}")
    against, base = resolve(against), resolve(base)
    windows = _windows(data, load_tokenizer(against), window, max_tokens)
    run = _Run(windows, progress, models=5 if svd else 3)
    with closing(Delta.open(delta_path)) as delta:
        checkpoint = Checkpoint.open(base)
        delta.check_base(checkpoint)
        finetune = load_model(against, torch.float32)
        wanted, expert, kl, agreement = _compare(run, finetune, expert_model(checkpoint, delta), data)
        rival = _rival(run, checkpoint, delta, Checkpoint.open(against), finetune, data) if svd else None
        del finetune
    likelihood = _score_base(run, load_model(base, torch.float32))
    return Evaluation(run.scored, likelihood, wanted, expert, kl, agreement, rival)


class _Run:
    """The windows of one evaluation and how far it is."""

    def __init__(self, windows: list[Tensor], progress: ProgressCallback | None, models: int) -> None:
        self.windows = windows
        self.scored = sum(len(ids) - 1 for ids in windows)
        self.meter = ProgressMeter(progress, "evaluating", models * sum(map(len, windows)))

    def batches(self, vocabulary: int) -> Iterator[Tensor]:
        return batches(self.windows, min(FORWARD_TOKENS, _LOGITS // vocabulary))

    def mean(self, total: float, what: str) -> float:
        if not math.isfinite(total):
            raise NonFiniteError(f"expected finite log-likelihoods of {what}, found {total}")
        return total / self.scored


def _windows(data: str | Path, tokenizer: Any, window: int, max_tokens: int | None) -> list[Tensor]:
    texts = read_texts(data, tokenizer)
    windows = [ids for ids in token_windows(texts, tokenizer, window, max_tokens=max_tokens) if len(ids) > 1]
    if not windows:
        raise DataError(f"expected at least two tokens of text to score, found fewer: {data}")
    return windows


def _compare(run: _Run, finetune: Any, expert: Any, data: str | Path) -> tuple[Score, Score, float, float]:
    """Run fine-tune and expert side by side: their scores, KL and agreement."""
    totals = torch.zeros(4, dtype=torch.float64)
    vocabulary = finetune.get_input_embeddings().num_embeddings
    grown = expert.get_input_embeddings().num_embeddings
    if grown != vocabulary:
        raise FormatError(
            f"expected the fine-tune's vocabulary of {vocabulary}, found {grown} in the delta",
            hint="--against names another fine-tune than the one that was compressed",
        )
    for batch in run.batches(vocabulary):
        check_vocabulary(batch, vocabulary, data)
        targets = batch[:, 1:].flatten()
        wanted = _logits(finetune, batch)
        run.meter.advance(batch.numel())
        found = _logits(expert, batch)
        run.meter.advance(batch.numel())
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            totals += prediction_sums(wanted[rows].log_softmax(-1), found[rows].log_softmax(-1), targets[rows])
    names = ("the fine-tune", "the expert", "the expert against the fine-tune", "the expert")
    means = [run.mean(float(total), name) for total, name in zip(totals, names, strict=True)]
    return Score(means[0]), Score(means[1]), max(means[2], 0.0), means[3]


def _rival(run: _Run, base: Checkpoint, delta: Delta, against: Checkpoint, finetune: Any, data: str | Path) -> Svd:
    """The same comparison with every quantized site as a truncated SVD of equal bytes."""
    quantized = [site for site in delta.sites.values() if isinstance(site, QuantizedSite)]
    rivals = {site.name: low_rank.svd_of_equal_bytes(site, base, against) for site in quantized}
    _, score, kl, agreement = _compare(run, finetune, expert_model(base, delta, delta.sites | rivals), data)
    ranks = [low_rank.rank_of_equal_bytes(site) for site in quantized]
    saved = sum(site.nbytes - rivals[site.name].nbytes for site in quantized)
    return Svd(score, kl, agreement, statistics.median(ranks) if ranks else None, delta.nbytes - saved)


def _score_base(run: _Run, base: Any) -> Score | None:
    vocabulary = base.get_input_embeddings().num_embeddings
    if max(int(ids.max()) for ids in run.windows) >= vocabulary:
        return None
    total = 0.0
    for batch in run.batches(vocabulary):
        targets = batch[:, 1:].flatten()
        logits = _logits(base, batch)
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            total += float(nll_sum(logits[rows].log_softmax(-1), targets[rows]))
        run.meter.advance(batch.numel())
    return Score(run.mean(total, "the base"))


@torch.inference_mode()
def _logits(model: Any, batch: Tensor) -> Tensor:
    """`float32 [n · (length - 1), vocabulary]`: for every token of each window but the first."""
    logits: Tensor = model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1).float()
