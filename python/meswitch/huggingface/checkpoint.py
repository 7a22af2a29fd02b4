"""Checkpoints: Hugging Face folders, whose tensors are views of mapped files, and models that were quantized."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from copy import copy
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from meswitch import _native
from meswitch.errors import CheckpointError, UnsupportedModelError
from meswitch.huggingface.config import read_config
from meswitch.huggingface.files import HUB_FILES, weight_files
from meswitch.huggingface.quantization import GGUF, gguf_hint, refuse_quantized

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)
_QUANTIZED = "meswitch.json"  # the manifest of a model that was quantized
_EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|wte|embed_in|word_embeddings)\.weight")
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

Source: TypeAlias = tuple[str, tuple[int, list[int]] | None]
"""Where a parameter lies: a tensor's name on disk, and the first element and the shape of a part of it, or `None`."""


def resolve(source: str | Path) -> Path:
    """The folder of a checkpoint, from its path or a hub id, which is downloaded unless it is in the hub's cache.

    Text such as `organisation/model` is a hub id unless there is a folder `organisation` here; a `Path` never is.
    Raises `CheckpointError` if it is neither, or holds GGUF files on the hub.
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
        downloaded = Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise CheckpointError(
            f"expected {source} as a folder or on the hub, found neither: no {folder.absolute()}; {error}",
            hint="check the path, or the network and the hub's cache",
        ) from error
    if "gguf" in source.lower() and not any(downloaded.glob("*.safetensors")):  # its weights were not downloaded
        raise CheckpointError(
            f"expected safetensors files on the hub, found none: {source}", hint=gguf_hint(source, f"FILE{GGUF}")
        )
    return downloaded


def _no_folder(source: str | Path, folder: Path) -> CheckpointError:
    """What is wrong with a path to no folder."""
    if not str(source):
        return CheckpointError("expected a checkpoint folder or a hub id, found empty text")
    if folder.suffix.lower() == GGUF and folder.exists():
        hint = gguf_hint(folder.parent, folder.name)
        return CheckpointError(f"expected a checkpoint folder, found a GGUF file: {folder.absolute()}", hint=hint)
    if folder.exists():
        return CheckpointError(
            f"expected a checkpoint folder, found a file: {folder.absolute()}", hint="give the folder that it lies in"
        )
    hint = "check the path; a hub id looks like organisation/model"
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        hint = f"check the path; with {folder.parent} here, {source} is not taken for a hub id"
    return CheckpointError(f"expected a checkpoint folder, found nothing: {folder.absolute()}", hint=hint)


class Checkpoint:
    """A checkpoint folder as transformers reads it: the parameters of its files, as views of the mapped files.

    A model that `quantize` made is one too: a parameter is decoded to float32 when it is asked for. `path`: the folder.
    `native`: the native half's checkpoint. Files are mapped when they are first read.
    Raises `CheckpointError` for a folder that is not a complete checkpoint, `UnsupportedModelError` for weights that
    another quantizer packed, `FormatError` or `ChecksumError` for a quantized model that is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: list[str] = []
        file_of: dict[str, str] = {}
        if (path / _QUANTIZED).is_file():
            self.native = _native.Checkpoint.open_quantized(path)
        else:
            self._files, file_of = weight_files(path)
            self.native = _native.Checkpoint(path, self._files)
        self._open: dict[Path, Any] = {}
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}  # of files whose tensors' places were asked for
        self._zeros = False
        stored = self.native.stored_names()
        if not self.is_quantized:
            config = self.config if (path / "config.json").is_file() else {}
            refuse_quantized(path, config, {name: self.native.info(name)[0] for name in stored}, DTYPES)
        missing = sorted(file_of.keys() - set(stored))
        if missing:
            raise CheckpointError(f"expected every tensor of the index, found no {missing[0]} in {path}")
        embedding = next(filter(_EMBEDDING.fullmatch, stored), None)
        if embedding is not None and HEAD not in stored and self.is_tied:
            own: dict[str, Source] = {name: (name, None) for name in stored}
            self.native = self.native.with_parameters(own, {HEAD: (embedding, None)})

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Opens a folder or hub id."""
        return cls(resolve(source))

    def with_parameters(self, sources: Mapping[str, Source]) -> Checkpoint:
        """The same files with other parameters: under other names, fewer of them, or parts of tensors.

        `lm_head.weight` is answered for as before. Raises `CheckpointError` for a source that is not in the files.
        """
        other = copy(self)
        aliases = {HEAD: self.source(HEAD)} if HEAD in self and HEAD not in sources else {}
        other.native = self.native.with_parameters(dict(sources), aliases)
        return other

    def zeros(self) -> Checkpoint:
        """The same parameters, all of zeros, which take no memory while they are only read: what a whole model is
        compared with when it is quantized."""
        other = copy(self)
        other.native, other._zeros = self.native.zeros(), True
        return other

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, parsed. Raises `CheckpointError` if there is none."""
        return read_config(self.path)

    @property
    def name(self) -> str:
        """What the model is called: by `config.json`, else by its folder. Raises as `config` does."""
        return str(self.config.get("_name_or_path") or self.path.name)

    @property
    def is_tied(self) -> bool:
        """Whether the config ties head and embedding; configs omit the field where it has the default, which is yes."""
        return (self.path / "config.json").is_file() and self.config.get("tie_word_embeddings") is not False

    @property
    def is_quantized(self) -> bool:
        """Whether `quantize` made it."""
        return self.native.quantized_from is not None

    def sample(self) -> str:
        """A quick hash of the tensors on disk: of names, dtypes, shapes and 3 KiB of each, or of their checksums."""
        return self.native.sample()

    def names(self) -> list[str]:
        """The names of the parameters, sorted."""
        return self.native.names()

    def __contains__(self, name: str) -> bool:
        """Whether there is a parameter of that name; in a tied checkpoint, `lm_head.weight` counts."""
        return self.native.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter."""
        return tuple(self.native.info(name)[1])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `tensor` has: on disk, or float32 of what is decoded.

        Raises `UnsupportedModelError` for one that only packed weights have.
        """
        dtype = self.native.info(name)[0]
        if dtype not in DTYPES:
            raise UnsupportedModelError(f"expected {name} in a dtype of plain weights, found {dtype}: {self.path}")
        return DTYPES[dtype]

    def source(self, name: str) -> Source:
        """Where a parameter lies. Raises `CheckpointError` if there is none of that name."""
        return self._find(name)[1:]

    def tensor(self, name: str) -> Tensor:
        """A view of a mapped parameter in its own dtype, or one that is decoded in float32.

        A tied checkpoint's `lm_head.weight` is its embedding. The tensor must not be written to. Raises
        `CheckpointError` if there is none of that name.
        """
        if self._zeros:
            return torch.zeros((), dtype=self.dtype(name)).expand(self.shape(name))
        if self.is_quantized:
            elements, dtype = self.native.read(name), self.dtype(name)
            flat = torch.frombuffer(elements, dtype=dtype) if elements else torch.empty(0, dtype=dtype)
            return flat.view(self.shape(name))
        file, on_disk, part = self._find(name)
        tensor: Tensor = self._mapped(file).get_tensor(on_disk)
        if part is None:
            return tensor
        start, shape = part
        return tensor.reshape(-1)[start : start + prod(shape)].view(shape)

    def extent(self, name: str) -> tuple[Path, int, int]:
        """Where a whole tensor lies: its file, its first byte in it, and the number of its bytes.

        Not for a quantized model. Raises `CheckpointError` if there is none of that name.
        """
        file, on_disk, _ = self._find(name)
        if file not in self._headers:
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                self._headers[file] = 8 + size, json.loads(opened.read(size))
        data, header = self._headers[file]
        start, end = header[on_disk]["data_offsets"]
        return file, data + start, end - start

    def slices(self) -> dict[str, Any]:
        """Every tensor on disk by name, read where it is indexed: what transformers loads a model from."""
        if self.is_quantized:
            return {name: _Decoded(self, name) for name in self.native.stored_names()}
        files = [self._mapped(self.path / file) for file in self._files]
        return {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118  no dictionary

    def _find(self, name: str) -> tuple[Path, str, tuple[int, list[int]] | None]:
        found = self.native.source(name)
        if found is None:
            raise CheckpointError(f"expected a tensor {name}, found none in {self.path}")
        return found

    def _mapped(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]


class _Decoded:
    """A tensor of a quantized model, decoded where it is indexed."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._checkpoint.tensor(self._name)[index]


def as_checkpoint(source: str | Path | Checkpoint) -> Checkpoint:
    """The checkpoint of a folder or a hub id; one that is open is returned as it is."""
    return source if isinstance(source, Checkpoint) else Checkpoint.open(source)
