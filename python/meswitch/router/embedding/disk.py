"""What an embedding router's folder holds: numbers in `router.json`, tensors in `router.safetensors`."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from meswitch.errors import RouterError
from meswitch.router.folder import MANIFEST, read_manifest, write_folder

KIND = "embedding"
TENSORS = "router.safetensors"
_TENSOR_NAMES = (
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


class RouterContents(NamedTuple):
    """What is stored of a router, in the order of `EmbeddingRouter`'s fields."""

    experts: tuple[str, ...]
    threshold: float
    temperature: float
    penalty: float
    tensors: dict[str, Tensor]
    base_fingerprint: str | None


def save_router(path: Path, contents: RouterContents) -> None:
    """Write a router's folder; raises `OutputError` where `path` is something other than a router."""
    blob = save_tensors(contents.tensors)
    manifest = {
        "kind": KIND,
        "base_fingerprint": contents.base_fingerprint,
        "experts": contents.experts,
        "threshold": contents.threshold,
        "temperature": contents.temperature,
        "penalty": contents.penalty,
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    write_folder(path, manifest, {TENSORS: blob})


def read_router(path: Path, base_fingerprint: str | None) -> RouterContents:
    """Read what `save_router` wrote; with `base_fingerprint`, the router must have been made for that base.

    Raises `RouterError` for a router that is missing, malformed, changed on disk, or another base's.
    """
    manifest = read_manifest(path)
    if manifest.get("kind") != KIND:
        raise RouterError(f"expected a router of kind {KIND!r}, found {manifest.get('kind')!r}: {path}")
    stored_fingerprint = manifest.get("base_fingerprint")
    if base_fingerprint is not None and stored_fingerprint != base_fingerprint:
        raise RouterError(
            f"expected a router for base {base_fingerprint}, found one for {stored_fingerprint}: {path}",
            hint="train the router again on this base: meswitch router train",
        )
    tensors = _read_tensors(path / TENSORS, manifest.get("sha256"))
    experts, numbers = _read_fields(manifest, path / MANIFEST)
    _check_tensors(tensors, len(experts), path / TENSORS)
    return RouterContents(experts, *numbers, tensors, stored_fingerprint)


def _read_fields(manifest: dict[str, Any], file: Path) -> tuple[tuple[str, ...], tuple[float, float, float]]:
    """The experts, and threshold, temperature and penalty."""
    try:
        experts = tuple(str(name) for name in manifest["experts"])
        threshold, temperature, penalty = (float(manifest[key]) for key in ("threshold", "temperature", "penalty"))
    except (KeyError, TypeError, ValueError) as error:
        raise RouterError(f"expected experts and numbers, found {error!r}: {file}") from error
    numbers = (threshold, temperature, penalty)
    if not (0 <= threshold <= 1 and temperature > 0 and all(map(math.isfinite, numbers))):
        raise RouterError(f"expected a threshold and a temperature, found {list(numbers)}: {file}")
    return experts, numbers


def _read_tensors(file: Path, digest: Any) -> dict[str, Tensor]:
    try:
        blob = file.read_bytes()
    except FileNotFoundError as error:
        raise RouterError(f"expected router.safetensors, found none: {file}") from error
    actual = hashlib.sha256(blob).hexdigest()
    if actual != digest:
        raise RouterError(f"expected sha256 {digest}, found {actual}: {file}", hint="the file was changed or cut short")
    try:
        return load_tensors(blob)
    except SafetensorError as error:
        raise RouterError(f"expected a safetensors file, found {error}: {file}") from error


def _check_tensors(tensors: dict[str, Tensor], count: int, file: Path) -> None:
    """Raises `RouterError` unless the tensors are those of a router with `count` labels."""
    if set(tensors) != set(_TENSOR_NAMES) or tensors["components"].dim() != 2 or tensors["exemplars"].dim() != 2:
        raise RouterError(f"expected tensors {', '.join(_TENSOR_NAMES)}, found {', '.join(sorted(tensors))}: {file}")
    for name, shape in _expected_shapes(tensors, count).items():
        tensor, dtype = tensors[name], torch.int64 if name == "labels" else torch.float32
        if tensor.shape != shape or tensor.dtype != dtype:
            actual = f"{tensor.dtype} {list(tensor.shape)}"
            raise RouterError(f"expected {name} to be {dtype} {list(shape)}, found {actual}: {file}")
        if not tensor.isfinite().all():
            raise RouterError(f"expected finite numbers, found others in {name}: {file}")
    labels = tensors["labels"]
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < count):
        raise RouterError(f"expected labels below {count}, found {int(labels.max())}: {file}")


def _expected_shapes(tensors: dict[str, Tensor], count: int) -> dict[str, tuple[int, ...]]:
    """By name, from the sizes of `components [d, k]` and `exemplars [m, k]`."""
    width, k = tensors["components"].shape
    m = tensors["exemplars"].shape[0]
    return {
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
