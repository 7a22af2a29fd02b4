"""Hugging Face checkpoints: where they are, what they hold, and their tensors as views of the mapped files."""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from meswitch import _native
from meswitch.errors import CheckpointError
from meswitch.huggingface.files import HUB_FILES

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HEAD = "lm_head.weight"
"""The name under which a tied checkpoint answers with its embedding."""

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def resolve(source: str | Path) -> Path:
    """The folder of a checkpoint, given itself or a hub id (whose offline cache is honoured).

    Raises `CheckpointError` where there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(str(source)) or folder.exists():
        raise CheckpointError(
            f"expected a checkpoint folder or a hub id, found {source}",
            hint="a hub id looks like organisation/model",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise CheckpointError(
            f"expected {source} as a folder or on the hub, found neither: {error}",
            hint="check the path, or the network and the hub's cache",
        ) from error


class Checkpoint:
    """A checkpoint folder: single file or shards, bf16, f16 or f32.

    Raises `CheckpointError` for what is not a whole checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.native = _native.Checkpoint(path)
        self._where = self._locate()
        self._open: dict[str, Any] = {}

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        return cls(resolve(source))

    def _locate(self) -> dict[str, str]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            where: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return where
        return dict.fromkeys(self.native.names(), "model.safetensors")

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, as it stands."""
        path = self.path / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"expected a config.json in {self.path}, found {type(error).__name__}",
                hint="a checkpoint folder holds config.json and model.safetensors, or shards and their index",
            ) from error
        return config

    def sample(self) -> str:
        """Which checkpoint this is, quickly: a hash of names, dtypes, shapes and 3 KiB of each tensor."""
        return self.native.sample()

    def names(self) -> list[str]:
        """The tensors on disk, by name in order."""
        return self.native.names()

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name, its own or, in a tied checkpoint, `lm_head.weight`."""
        return self.native.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.native.info(name)[1])

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.native.info(name)[0]]

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped tensor, in its own dtype; a tied checkpoint's `lm_head.weight` is its embedding."""
        file = self._where.get(name)
        if file is None and name in self:
            name = self.native.alias(name)
            file = self._where[name]
        if file is None:
            raise CheckpointError(f"expected a tensor {name}, found none in {self.path}")
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor
