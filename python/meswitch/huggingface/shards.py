"""The safetensors files of a checkpoint that is written: one, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from meswitch.huggingface.files import INDEX, WEIGHTS

SHARD_BYTES = 4 << 30
"""The size of a file, unless one tensor is larger."""


def write_shards(
    folder: Path, sizes: Mapping[str, int], tensor: Callable[[str], Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes tensors, each as `tensor(name)` gives it, in the order of `sizes`, which are their bytes.

    Memory holds one file's tensors at a time. Raises `OSError` where files cannot be written.
    """
    shards = _shards(sizes, shard_bytes)
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        # Copies: safetensors refuses tensors that share memory, as views of one mapped file do.
        tensors = {name: tensor(name).clone(memory_format=torch.contiguous_format) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """The names by file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        filled += size
        shards[-1].append(name)
    return shards
