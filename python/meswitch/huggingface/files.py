"""The files of a checkpoint besides its weights: configs, tokenizer and chat template, by pattern."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece*.model", "*.tiktoken")
"""Files with a tokenizer's vocabulary; a folder without any of them has no tokenizer."""

TEMPLATE = ("chat_template.*",)
TOKENIZER = (*VOCABULARY, *TEMPLATE, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt")
SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER)
"""The files that a delta directory keeps of its fine-tune."""

HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""The files that are downloaded from the hub: weights, indices and small files, no pickles."""


def small_files(folder: Path) -> dict[str, Path]:
    """The paths of a checkpoint's small files, by name."""
    return {file.name: file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()}


def matches(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that match any of the patterns, in their order.

    >>> matches(["vocab.json", "config.json"], VOCABULARY)
    ['vocab.json']
    """
    patterns = tuple(patterns)
    return [name for name in names if any(Path(name).match(pattern) for pattern in patterns)]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any(file.is_file() for pattern in VOCABULARY for file in folder.glob(pattern))
