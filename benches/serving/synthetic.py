"""Delta directories of any size whose values mean nothing."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import torch

from meswitch import _native


def write_delta(path: Path, tensors: int, nbytes: int) -> Path:
    """A delta directory of so many stored tensors of so many bytes each, all with the same content."""
    names, shape = [f"w{at}" for at in range(tensors)], [nbytes // 4]
    content = torch.randn(shape).numpy().tobytes()
    entry = {"kind": "replaced", "shape": shape, "dtype": "F32", "bytes": 0, "bpw": 0.0, "relative_error": 0.0}
    sites = [json.dumps(entry | {"name": name, "tensors": {}}) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        base = _empty_checkpoint(Path(folder), names, shape)
        _native.write(base, path, sites, lambda _: [content], [], "{}", "", lambda *_: None)
    return path


def _empty_checkpoint(folder: Path, names: list[str], shape: list[int]) -> _native.Checkpoint:
    """A base of zeros in a file that takes no room on the disk."""
    size = 4 * shape[0]
    places = {name: [at * size, (at + 1) * size] for at, name in enumerate(names)}
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": place} for name, place in places.items()}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + len(names) * size)
    return _native.Checkpoint(folder, ["model.safetensors"])
