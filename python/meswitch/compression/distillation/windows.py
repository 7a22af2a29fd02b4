"""The text of a distillation: windows of tokens to train on, and others that only measure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meswitch.compression.likelihood import NO_TARGET
from meswitch.errors import DataError
from meswitch.huggingface.text import check_vocabulary, load_tokenizer, read_texts, shuffled_passages, token_windows

TEXT = 0.2  # what the likelihood of the text itself weighs beside a KL of one nat
_HELDOUT_TOKENS = 2048  # more would cost more than it tells
_PASSAGE_CHARACTERS = 8192


def text_weight(divergence: float) -> float:
    """What the likelihood of the text weighs beside a KL of `divergence` nats a token.

    What it costs in KL goes as its square: in proportion to KL's root, it costs every expert the same part.
    """
    return TEXT * math.sqrt(max(divergence, 0.0))


@dataclass(frozen=True)
class Windows:
    """`train int64 [n, length]`, `heldout int64 [m, length]`, n and m at least 1."""

    train: Tensor
    heldout: Tensor

    @classmethod
    def draw(cls, data: str | Path, tokenizer: Path, length: int, wanted: int, seed: int, share: float) -> Windows:
        """About `wanted` windows to train on and a `share` as many to measure on, from passages all over the text.

        Raises `DataError` for text of less than two windows.
        """
        loaded = load_tokenizer(tokenizer)
        most = max(1, _HELDOUT_TOKENS // length)
        drawn = shuffled_passages(read_texts(data, loaded), _PASSAGE_CHARACTERS, seed)
        chunks = token_windows(drawn, loaded, length, max_tokens=(wanted + most) * length)
        windows = [ids for ids in chunks if len(ids) == length]
        if len(windows) < 2:
            raise DataError(
                f"expected text of at least {2 * length} tokens to distil on, found {sum(map(len, chunks))}: {data}",
                hint="give more text, or a smaller window",
            )
        kept = min(most, max(1, round(share * len(windows))))
        return cls(torch.stack(windows[:-kept]), torch.stack(windows[-kept:]))

    @property
    def context(self) -> int:
        """Tokens at the start of a window that nobody is asked about.

        A window begins in mid-sentence: what comes next is anybody's guess, and a few such guesses can outweigh all
        other answers.
        """
        return self.train.shape[1] // 8

    @property
    def asked(self) -> int:
        """Tokens of a window that somebody is asked about."""
        return self.train.shape[1] - self.context

    def following(self, numbers: Tensor) -> Tensor:
        """What follows the tokens that somebody is asked about, in some windows to train on: `int64 [n · asked]`."""
        return nn.functional.pad(self.train[numbers], (0, 1), value=NO_TARGET)[:, 1 + self.context :].flatten()

    def check(self, vocabulary: int, data: str | Path) -> None:
        """Raises `DataError` for a token that the models have no row for."""
        for ids in (self.train, self.heldout):
            check_vocabulary(ids, vocabulary, data)

    def batches(self, size: int, steps: int, seed: int) -> Iterator[Tensor]:
        """`steps` times the numbers of at most `size` windows, passing over them in a new order each time."""
        generator, count = torch.Generator().manual_seed(seed), len(self.train)
        order: list[int] = []
        size = min(size, count)
        for _ in range(steps):
            while len(order) < size:
                order += torch.randperm(count, generator=generator).tolist()
            yield torch.tensor(order[:size])
            del order[:size]
