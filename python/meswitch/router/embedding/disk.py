"""An embedding router's folder: `router.json` and `router.safetensors`, checked as they are read."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from meswitch.errors import RouterError

FORMAT_VERSION = 1
_TENSORS = (
    "mean",
    "scale",
    "components",
    "whitening",
    "left",
    "centers",
    "limits",
    "weight",
    "bias",
    "exemplars",
    "labels",
)


def read_manifest(path: Path) -> dict[str, Any]:
    """`router.json` of a router's folder; raises `RouterError` where it is missing, malformed or of a later version."""
    file = path / "router.json"
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RouterError(f"expected a router, found no router.json: {path}", hint="meswitch router train") from error
    except (ValueError, RecursionError) as error:
        raise RouterError(f"expected JSON, found {error}: {file}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise RouterError(f"expected format version {FORMAT_VERSION}, found {version!r}: {file}")
    assert isinstance(manifest, dict)
    return manifest


def _read_tensors(file: Path, digest: Any) -> dict[str, Tensor]:
    try:
        blob = file.read_bytes()
    except FileNotFoundError as error:
        raise RouterError(f"expected router.safetensors, found none: {file}") from error
    found = hashlib.sha256(blob).hexdigest()
    if found != digest:
        raise RouterError(f"expected sha256 {digest}, found {found}: {file}", hint="the file was changed or cut short")
    try:
        return load_tensors(blob)
    except SafetensorError as error:
        raise RouterError(f"expected a safetensors file, found {error}: {file}") from error


def _check_shapes(tensors: dict[str, Tensor], count: int, file: Path) -> None:
    if set(tensors) != set(_TENSORS) or tensors["components"].dim() != 2 or tensors["exemplars"].dim() != 2:
        raise RouterError(f"expected tensors {', '.join(_TENSORS)}, found {', '.join(sorted(tensors))}: {file}")
    width, k = tensors["components"].shape
    m = tensors["exemplars"].shape[0]
    shapes: dict[str, tuple[int, ...]] = {
        "mean": (width,),
        "scale": (width,),
        "components": (width, k),
        "weight": (k, count),
        "bias": (count,),
        "whitening": (k, k),
        "left": (),
        "centers": (count, k),
        "limits": (count,),
        "exemplars": (m, k),
        "labels": (m,),
    }
    for name, shape in shapes.items():
        tensor, dtype = tensors[name], torch.int64 if name == "labels" else torch.float32
        if tensor.shape != shape or tensor.dtype != dtype:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise RouterError(f"expected {name} to be {dtype} {list(shape)}, found {found}: {file}")
        if not tensor.isfinite().all():
            raise RouterError(f"expected finite numbers, found others in {name}: {file}")
    labels = tensors["labels"]
    if m and not (int(labels.min()) >= 0 and int(labels.max()) < count):
        raise RouterError(f"expected labels below {count}, found {int(labels.max())}: {file}")


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _check_target(path: Path) -> None:
    if not path.exists() or (path.is_dir() and (not any(path.iterdir()) or (path / "router.json").exists())):
        return
    raise RouterError(f"expected a new folder or a router to replace, found something else: {path}")
