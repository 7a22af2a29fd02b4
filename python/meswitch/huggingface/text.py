"""Text for calibration, evaluation, distillation and routers: data files, tokens, and windows of them.

    file ── read_texts ── documents ── shuffled_passages ── token_windows ── windows ── batches ── [n, length]

A data file is `.txt`, one document, or `.jsonl`, one document a line.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from meswitch.errors import CheckpointError, DataError

_FORMS = '{"text"}, {"prompt"[, "completion"]} or {"messages"}'
FORWARD_TOKENS = 2048
"""Tokens of one forward pass, where text is only run through a model: enough to keep the processor busy."""

_CHARACTERS_PER_TOKEN = 4  # roughly; sets the length of passages


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in the folder `path`. Raises `CheckpointError` if there is none that loads."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"expected a tokenizer, found none that loads: {path}",
            hint="the folder needs tokenizer.json or what its tokenizer class reads",
        ) from error


def read_texts(path: str | Path, tokenizer: Any) -> list[str]:
    """The documents of a data file: a `.txt` is one document, a `.jsonl` has one a line.

    A line is `{"text": …}`, `{"prompt": …}` with or without `"completion"` (joined without anything between), or
    `{"messages": […]}`, which the tokenizer's chat template renders. Empty documents are left out.

    Raises `DataError` with file and line, `OSError` if the file cannot be opened.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"expected a .txt or .jsonl file, found {path.name}", hint="rename it to say which it is")
    if path.suffix == ".txt":
        texts = [_decode(path)]
    else:
        texts = [_text(line, where, tokenizer) for where, line in json_lines(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"expected text, found an empty file: {path}")
    return texts


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("file:line", object)` of each line of a `.jsonl` file that is not blank. Raises `DataError`."""
    # Not splitlines(): a JSON string may contain U+2028 and other line separators.
    for number, line in enumerate(_decode(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"expected a JSON object a line, found {_short(line)}: {where}") from error
        if not isinstance(value, dict):
            raise DataError(f"expected a JSON object a line, found {type(value).__name__}: {where}")
        yield where, value


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 text, found byte {error.object[error.start]:#04x}: {path}") from error


def _text(line: dict[str, Any], where: str, tokenizer: Any) -> str:
    if "messages" in line:
        return _chat(line["messages"], where, tokenizer)
    if "text" in line:
        return string_field(line, "text", where)
    if "prompt" in line:
        completion = string_field(line, "completion", where) if "completion" in line else ""
        return string_field(line, "prompt", where) + completion
    found = ", ".join(map(repr, line)) or "no key"
    raise DataError(f"expected {_FORMS}, found {found}: {where}")


def string_field(line: dict[str, Any], key: str, where: str) -> str:
    """`line[key]`. Raises `DataError`, with `where` in its text, if that is not a string of Unicode text."""
    value = line.get(key)
    if not isinstance(value, str):
        found = type(value).__name__ if key in line else "nothing"
        raise DataError(f"expected a string under {key!r}, found {found}: {where}")
    # A lone surrogate is valid JSON but not text, and tokenizers raise errors of their own for it.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"expected text under {key!r}, found a lone surrogate: {where}")
    return value


def _chat(messages: Any, where: str, tokenizer: Any) -> str:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"expected a list of messages under 'messages', found {_short(repr(messages))}: {where}")
    for message in messages:
        string_field(message, "role", where)
        string_field(message, "content", where)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"expected a tokenizer with a chat template for 'messages', found one without: {where}",
            hint='give {"text"} or {"prompt", "completion"} lines',
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program that may raise anything
        raise DataError(f"expected messages the chat template accepts, found {error}: {where}") from error


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "…")


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
    return list(torch.split(sequence, length)) if ids else []


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


def check_vocabulary(ids: Tensor, vocabulary: int, data: str | Path) -> None:
    """Raises `DataError` for a token that the model has no row for, as one added to the tokenizer alone has."""
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise DataError(
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
