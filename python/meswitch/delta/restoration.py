"""From a delta back to ordinary parameters, and to an ordinary checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from meswitch import reference
from meswitch.delta.directory import TENSORS, Delta
from meswitch.errors import BaseMismatchError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.site import ReplacedSite, Site
from meswitch.target import new_folder, resolve_target


def rebuild(site: Site, base: Checkpoint | None, *, rounded: bool = True) -> Tensor:
    """The parameter of a site: `reference.restored` in the fine-tune's dtype, or `reference.served` unless `rounded`.

    Without a base it is that of a quantized model, whose base is zeros. May be a view of a mapped file, which must not
    be written to.
    """
    if isinstance(site, ReplacedSite):
        return site.value
    parameter = torch.zeros(site.shape, dtype=site.dtype) if base is None else base.tensor(site.name)
    return reference.restored(site, parameter) if rounded else reference.served(site, parameter)


def restore(
    base: str | Path | None,
    delta: str | Path,
    out: str | Path,
    *,
    allow_quantized_base: bool = False,
    shard_bytes: int = 4 << 30,
    progress: ProgressCallback | None = None,
) -> None:
    """Writes an ordinary checkpoint: base plus delta, in the fine-tune's shapes and dtypes, with its tokenizer.

    `base`: a folder or hub id, `None` where `delta` is a whole model (`quantize`). `allow_quantized_base`: a quantized
    form of the delta's base will do. `shard_bytes`: the size of a
    safetensors file, unless one parameter is larger; memory holds one file's tensors at a time. `progress` counts
    weights. An interrupted run leaves nothing at `out`.

    Raises `BaseMismatchError` for another base, or one too many or too few; `OutputError` if `out` is a file or a
    folder with something in it, `CheckpointError`, `UnsupportedModelError` for a base that another quantizer made, and
    `OSError` if files cannot be written.

    >>> restore("base/", "experts/math", "merged/")
    >>> Checkpoint.open("merged/").names() == Checkpoint.open("base/").names()
    True
    """
    target = resolve_target(out, replaces=None)
    opened = Delta.open(delta)
    checkpoint = base_of(opened, base, allow_quantized=allow_quantized_base)
    meter = ProgressMeter(progress, "restoring", opened.parameters)
    with new_folder(target, replaces=None) as folder:
        for file in opened.manifest["files"]:
            if file != TENSORS:
                (folder / file).write_bytes(opened.read_file(file))
        _write_shards(folder, opened, checkpoint, shard_bytes, meter)


def base_of(delta: Delta, base: str | Path | None, *, allow_quantized: bool) -> Checkpoint | None:
    """What an opened directory is added to: its base, or nothing for a whole model. Raises `BaseMismatchError`."""
    if delta.kind == "base":
        if base is not None:
            raise BaseMismatchError(f"expected no base for a quantized model, found {base}: {delta.path}")
        return None
    if base is None:
        raise BaseMismatchError(f"expected the base of a delta, found none: {delta.path}")
    checkpoint = Checkpoint.open(base)
    delta.check_base(checkpoint, allow_quantized=allow_quantized)
    return checkpoint


def _write_shards(folder: Path, delta: Delta, base: Checkpoint | None, shard_bytes: int, meter: ProgressMeter) -> None:
    shards = _shards(delta, shard_bytes)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            meter.advance(0, name)
            site = delta.sites[name]
            # A copy: safetensors refuses tensors that share memory, as views of one mapped file do.
            tensors[name] = rebuild(site, base).clone(memory_format=torch.contiguous_format)
            meter.advance(site.parameters)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(site.parameters * site.dtype.itemsize for site in delta.outline.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text)


def _shards(delta: Delta, shard_bytes: int) -> list[list[str]]:
    """Parameter names by file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, site in delta.outline.items():
        size += site.parameters * site.dtype.itemsize
        if size > shard_bytes and shards[-1]:
            shards.append([])
            size = site.parameters * site.dtype.itemsize
        shards[-1].append(name)
    return shards
