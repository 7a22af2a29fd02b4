"""Hugging Face checkpoints: finding them, and their tensors as views of the mapped files."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from meswitch import _native
from meswitch.errors import CheckpointError
from meswitch.huggingface.files import HUB_FILES

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
HEAD = "lm_head.weight"
"""The head's name. A checkpoint of a tied model has no such tensor, and returns its embedding under it."""

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
    """The folder of a checkpoint, from its path or a hub id, which is downloaded unless it is in the hub's cache.

    Text such as `organisation/model` is a hub id unless there is a folder `organisation` here; a `Path` never is.
    Raises `CheckpointError` if it is neither.
    """
    folder = Path(source)
    with suppress(RuntimeError):  # a user whose home is not known
        folder = folder.expanduser()
    if str(source) and folder.is_dir():
        return folder
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or folder.parent.exists():
        raise _no_folder(source, folder)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise CheckpointError(
            f"expected {source} as a folder or on the hub, found neither: no {folder.absolute()}; {error}",
            hint="check the path, or the network and the hub's cache",
        ) from error


def _no_folder(source: str | Path, folder: Path) -> CheckpointError:
    """What is wrong with a path to no folder."""
    if not str(source):
        return CheckpointError("expected a checkpoint folder or a hub id, found empty text")
    if folder.exists():
        return CheckpointError(
            f"expected a checkpoint folder, found a file: {folder.absolute()}", hint="give the folder that it lies in"
        )
    hint = "check the path; a hub id looks like organisation/model"
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        hint = f"check the path; with {folder.parent} here, {source} is not taken for a hub id"
    return CheckpointError(f"expected a checkpoint folder, found nothing: {folder.absolute()}", hint=hint)


class Checkpoint:
    """A checkpoint folder: one safetensors file or several with an index.

    `path`: the folder. `native`: the native half's checkpoint. Files are mapped when they are first read.
    Raises `CheckpointError` for a folder that is not a complete checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.native = _native.Checkpoint(path)
        self._file_of = self._read_index()
        self._open: dict[str, Any] = {}

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Opens a folder or hub id."""
        return cls(resolve(source))

    def _read_index(self) -> dict[str, str]:
        """The file of every tensor."""
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return file_of
        return dict.fromkeys(self.native.names(), "model.safetensors")

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, parsed. Raises `CheckpointError` if there is none."""
        path = self.path / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"expected a config.json in {self.path}, found {type(error).__name__}",
                hint="a checkpoint folder holds config.json and model.safetensors, or shards and their index",
            ) from error
        return config

    @property
    def name(self) -> str:
        """What the model is called: by `config.json`, else by its folder. Raises as `config` does."""
        return str(self.config.get("_name_or_path") or self.path.name)

    def sample(self) -> str:
        """A quick hash of the checkpoint: of names, dtypes, shapes and 3 KiB of each tensor."""
        return self.native.sample()

    def names(self) -> list[str]:
        """The names of the tensors on disk, sorted."""
        return self.native.names()

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name; in a tied checkpoint, `lm_head.weight` counts."""
        return self.native.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.native.info(name)[1])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor on disk."""
        return DTYPES[self.native.info(name)[0]]

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped tensor, in its own dtype; a tied checkpoint's `lm_head.weight` is its embedding.

        It must not be written to. Raises `CheckpointError` if there is none of that name.
        """
        file = self._file_of.get(name)
        if file is None and name in self:
            name = self.native.alias(name)
            file = self._file_of[name]
        if file is None:
            raise CheckpointError(f"expected a tensor {name}, found none in {self.path}")
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        tensor: Tensor = self._open[file].get_tensor(name)
        return tensor
