"""The text of a distillation: windows of tokens to train on, and others that only measure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from meswitch.compression.distillation.options import DistillOptions
from meswitch.compression.likelihood import NO_TARGET
from meswitch.errors import DataError
from meswitch.huggingface.documents import read_texts
from meswitch.huggingface.text import check_vocabulary, load_tokenizer, shuffled_passages, token_windows

TEXT_WEIGHT = 0.2  # of the text's NLL beside a KL of one nat
_HELDOUT_TOKENS = 2048  # more would cost time and hardly change which scales win
_PASSAGE_CHARACTERS = 8192


def text_weight(kl: float) -> float:
    """The weight of the text's NLL in the loss, beside a KL of `kl` nats a token.

    Training on the text raises KL by about the square of this weight, so in proportion to √KL it costs every expert the
    same share of its KL.

    >>> text_weight(0.25)
    0.1
    """
    return TEXT_WEIGHT * math.sqrt(max(kl, 0.0))


@dataclass(frozen=True)
class Windows:
    """Windows of tokens: `train int64 [n, length]` and `heldout int64 [m, length]`, n and m at least 1."""

    train: Tensor
    heldout: Tensor

    @classmethod
    def from_text(cls, data: str | Path, tokenizer: Path, options: DistillOptions) -> Windows:
        """As many windows as the steps ask for, some of them held out, from passages all over the text.

        `tokenizer`: the folder of the tokenizer. Raises `DataError` for text of less than two windows.
        """
        loaded, length = load_tokenizer(tokenizer), options.window
        most_heldout = max(1, _HELDOUT_TOKENS // length)
        passages = shuffled_passages(read_texts(data, loaded), _PASSAGE_CHARACTERS, options.seed)
        max_tokens = (options.steps * options.batch + most_heldout) * length
        chunks = token_windows(passages, loaded, length, max_tokens=max_tokens)
        windows = [ids for ids in chunks if len(ids) == length]
        if len(windows) < 2:
            raise DataError(
                f"expected text of at least {2 * length} tokens to distil on, found {sum(map(len, chunks))}: {data}",
                hint="give more text, or a smaller window",
            )
        heldout = min(most_heldout, max(1, round(options.heldout_share * len(windows))))
        return cls(torch.stack(windows[:-heldout]), torch.stack(windows[-heldout:]))

    @property
    def context(self) -> int:
        """Tokens at the start of a window whose predictions are not scored.

        A window begins in mid-sentence. Its first next tokens are guesses, and a few of them can outweigh all other
        predictions.
        """
        return self.train.shape[1] // 8

    @property
    def scored(self) -> int:
        """Tokens of a window whose predictions are scored."""
        return self.train.shape[1] - self.context

    def next_tokens(self, numbers: Tensor) -> Tensor:
        """The token after every scored token of the training windows `numbers`: `int64 [len(numbers) · scored]`.

        `NO_TARGET` after the last of a window.
        """
        return nn.functional.pad(self.train[numbers], (0, 1), value=NO_TARGET)[:, 1 + self.context :].flatten()

    def check(self, vocabulary: int, data: str | Path) -> None:
        """Raises `DataError` for a token that the models have no row for."""
        for ids in (self.train, self.heldout):
            check_vocabulary(ids, vocabulary, data)

    def batches(self, size: int, steps: int, seed: int) -> Iterator[Tensor]:
        """The numbers of at most `size` training windows, `steps` times; every pass over them is in a new order."""
        generator, count = torch.Generator().manual_seed(seed), len(self.train)
        order: list[int] = []
        size = min(size, count)
        for _ in range(steps):
            while len(order) < size:
                order += torch.randperm(count, generator=generator).tolist()
            yield torch.tensor(order[:size])
            del order[:size]
