"""Random deltas whose values mean nothing: any bytes are codes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from meswitch import _native, reference
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import Part, QuantizedSite

SCALE = 1e-4


@cache
def noise() -> Tensor:
    """`int32 [4 Mi]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 31), 1 << 31, (1 << 22,), generator=generator, dtype=torch.int64).int()


def random_codes(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    """`int32 [words]`: packed codes of so many rows, from another place of the noise for another seed."""
    words = reference.row_bytes(bits, columns) * reference.padded_rows(rows) // 4
    return noise().roll(7919 * seed).repeat(-(-words // len(noise())))[:words].clone()


def random_site(rows: int, columns: int, bits: int, seed: int) -> QuantizedSite:
    """A delta of one part with a scale a row."""
    codes, scales = random_codes(rows, columns, bits, seed), torch.full((1, rows), SCALE, dtype=torch.float16)
    part = Part(bits, (2**bits - 1) / 2, codes, scales)
    return QuantizedSite(name="random", shape=(rows, columns), dtype=torch.bfloat16, parts=(part,))


def bytes_read(site: QuantizedSite) -> int:
    """Of codes and scales, by a product."""
    return sum(part.codes.nbytes + part.scales.nbytes for part in site.parts)


def write_random_delta(base: Path, folder: Path, bits: int) -> int:
    """A delta directory for a Llama checkpoint with every matrix of its layers at so many bits; bytes of its tensors.

    Nothing is compressed: codes are noise, the same for every matrix of a shape, whose columns are a multiple of 8.
    """
    checkpoint, sites, total = Checkpoint(base), {}, 0
    cache: dict[tuple[int, ...], Sequence[bytes]] = {}
    for name in checkpoint.names():
        dtype, shape = checkpoint.native.info(name)
        entry = {"name": name, "shape": shape, "dtype": dtype, "bytes": 0, "bpw": 0.0, "relative_error": 0.0}
        entry |= {"kind": "shared", "tensors": {}}
        if name.startswith("model.layers.") and len(shape) == 2:
            key = tuple(shape)
            if key not in cache:
                site = random_site(shape[0], shape[1], bits, seed=len(cache))
                cache[key] = [tensor.numpy().tobytes() for tensor in (site.parts[0].codes, site.parts[0].scales)]
            entry |= {"kind": "quantized", "parts": [{"bits": bits, "zero": (2**bits - 1) / 2}]}
            total += sum(map(len, cache[key]))
        sites[name] = entry
    _native.write(
        checkpoint.native,
        folder,
        [json.dumps(entry) for entry in sites.values()],
        lambda name: cache.get(tuple(sites[name]["shape"]), []) if sites[name]["kind"] == "quantized" else [],
        [base / "config.json"],
        "{}",
        "random",
        lambda *_: None,
    )
    return total
