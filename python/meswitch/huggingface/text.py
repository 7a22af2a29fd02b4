"""Text for calibration, evaluation, distillation and routers: tokens, and windows of them.

file ── read_texts ── documents ── shuffled_passages ── token_windows ── windows ── batches ── [n, length]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from meswitch.errors import CheckpointError, DataError, MeswitchError
from meswitch.huggingface.documents import read_texts

FORWARD_TOKENS = 2048
"""Tokens of one forward pass, where text is only run through a model: enough to keep the processor busy."""

_CHARACTERS_PER_TOKEN = 4  # roughly; sets the length of passages


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the folder `path`. Raises `CheckpointError` if there is none that loads.

    Mistral's tekken.json becomes a tokenizer of transformers too, whether or not the package mistral-common is there.
    """
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, mistral_format=False)
    except Exception as error:  # a broken file may raise anything in a tokenizer's class
        raise CheckpointError(
            f"expected a tokenizer, found none that loads: {path}: {type(error).__name__}",
            hint="the folder needs tokenizer.json or what its tokenizer class reads",
        ) from error


def token_windows(texts: Iterable[str], tokenizer: Any, length: int, *, max_tokens: int | None = None) -> list[Tensor]:
    """The texts as one sequence of tokens, cut into windows `int64 [length]`, of which the last may be shorter.

    The tokenizer's end-of-sequence token separates texts. At most `max_tokens` tokens.
    """
    ids: list[int] = []
    for text in texts:
        if max_tokens is not None and len(ids) >= max_tokens:
            break
        if ids and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        ids.extend(token_ids(text, tokenizer))
    sequence = torch.tensor(ids[:max_tokens], dtype=torch.int64)
    return list(torch.split(sequence, min(length, len(ids)))) if ids else []


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of one text. A text that begins with the beginning-of-sequence token, as chat templates write it, gets
    no second one.
    """
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return list(tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"])


def batches(windows: Sequence[Tensor], tokens: int) -> Iterator[Tensor]:
    """Consecutive windows of equal length as batches `int64 [n, length]`, of at most `tokens` tokens or of one."""
    start = 0
    while start < len(windows):
        length = len(windows[start])
        stop = start + 1
        while stop < len(windows) and len(windows[stop]) == length and (stop + 1 - start) * length <= tokens:
            stop += 1
        yield torch.stack(list(windows[start:stop]))
        start = stop


def check_vocabulary(
    ids: Tensor, vocabulary: int, data: str | Path, error: Callable[..., MeswitchError] = DataError
) -> None:
    """Raises `error` for a token that the model has no row for, as one added to the tokenizer alone has none.

    `data`: where the token is from.
    """
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise error(
            f"expected token ids below {vocabulary}, the model's vocabulary, found {int(ids.max())}: {data}",
            hint="the tokenizer has tokens that the model has no row for",
        )


def shuffled_passages(texts: list[str], size: int, seed: int) -> Iterator[str]:
    """The texts in pieces of at most `size` characters, shuffled by `seed`, so that the first few are from all over."""
    pieces = [(text, start) for text in texts for start in range(0, len(text), size)]
    random.Random(seed).shuffle(pieces)
    return (text[start : start + size] for text, start in pieces)


def draw_windows(
    folder: Path, data: str | Path, *, max_tokens: int, window: int, seed: int, purpose: str
) -> list[Tensor]:
    """Windows of text from all over `data`, at most `int64 [window]` each, tokenized for the model in `folder`.

    `purpose` completes the error for a file without text. Raises `ValueError` for sizes below 1, `DataError`,
    `CheckpointError` if there is no tokenizer.
    """
    if max_tokens < 1 or window < 1:
        raise ValueError(f"expected at least 1 token and a window of at least 1, found {max_tokens}, {window}")
    tokenizer = load_tokenizer(folder)
    passages = shuffled_passages(read_texts(data, tokenizer), window * _CHARACTERS_PER_TOKEN, seed)
    windows = token_windows(passages, tokenizer, window, max_tokens=max_tokens)
    if not windows:
        raise DataError(f"expected text to {purpose}, found no token: {data}")
    return windows
