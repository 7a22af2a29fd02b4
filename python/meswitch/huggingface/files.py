"""Which small files belong to a checkpoint: its configs, tokenizer and chat template.

Every list of such files in the package is made from these patterns.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece*.model", "*.tiktoken")
"""Files that hold a tokenizer's vocabulary; a folder without any has no tokenizer."""

TEMPLATE = ("chat_template.*",)
TOKENIZER = (*VOCABULARY, *TEMPLATE, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt")
SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER)
"""Everything of a checkpoint that lies beside a delta's tensors."""

HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""What is fetched from the hub: weights, indices and small files, nothing pickled."""


def small_files(folder: Path) -> dict[str, Path]:
    """The small files of a checkpoint, by name."""
    return {file.name: file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()}


def matches(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that any of the patterns matches, in order.

    >>> matches(["vocab.json", "config.json"], VOCABULARY)
    ['vocab.json']
    """
    patterns = tuple(patterns)
    return [name for name in names if any(Path(name).match(pattern) for pattern in patterns)]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any(file.is_file() for pattern in VOCABULARY for file in folder.glob(pattern))
