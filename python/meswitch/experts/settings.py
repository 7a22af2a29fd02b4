"""What an expert's own small files say: tokenizer, generation config, end-of-sequence ids.

Each is read from the expert's folder when it is first needed, and from the base's where the expert brings none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from meswitch.errors import RequestError
from meswitch.experts.catalogue import Expert
from meswitch.huggingface.files import has_tokenizer
from meswitch.huggingface.text import load_tokenizer


class ExpertSettings:
    """Settings of the base in `folder` and of its experts; `None` in an expert's place is the base.

    May be used from any thread. `lock` guards loading and encoding: a tokenizer must not be used by two threads at
    once.
    """

    def __init__(self, folder: Path, text_config: Any) -> None:
        self._folder, self._text_config = folder, text_config
        self._base: dict[str, Any] = {}
        self.lock = threading.RLock()

    def config(self, expert: Expert | None) -> Any:
        """The text config that the expert's requests run under."""
        return self._text_config if expert is None or expert.config is None else expert.config

    def tokenizer(self, expert: Expert | None) -> Any:
        """The tokenizer, or `None` where neither the expert nor the base has one."""
        tokenizer = self._read(expert, "tokenizer", _read_tokenizer)
        return self.tokenizer(None) if tokenizer is None and expert is not None else tokenizer

    def required_tokenizer(self, expert: Expert | None) -> Any:
        """The tokenizer. Raises `RequestError` where there is none."""
        tokenizer = self.tokenizer(expert)
        if tokenizer is None:
            raise RequestError("the base has no tokenizer files", hint="pass prompts as lists of token ids")
        return tokenizer

    def generation_config(self, expert: Expert | None) -> GenerationConfig:
        """The expert's generation config, else the base's, else transformers' defaults."""
        config = self._read(expert, "generation_config", _read_generation_config)
        if isinstance(config, GenerationConfig):
            return config
        return GenerationConfig() if expert is None else self.generation_config(None)

    def eos_ids(self, expert: Expert | None) -> set[int]:
        """The ids that end a sequence: by the generation config, else the model's config, else the tokenizer."""
        for owner in (self.generation_config(expert), self.config(expert), self.tokenizer(expert)):
            ids = getattr(owner, "eos_token_id", None)
            if ids is not None:
                return {int(i) for i in (ids if isinstance(ids, list | tuple) else [ids])}
        return set()

    def _read(self, expert: Expert | None, what: str, read: Callable[[Path], Any]) -> Any:
        """Something of the expert's folder, or the base's, read once."""
        kept = self._base if expert is None else expert.extras
        with self.lock:
            if what not in kept:
                folder = self._folder if expert is None else expert.path
                kept[what] = None if folder is None else read(folder)
            return kept[what]


def _read_tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def _read_generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").exists():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)
