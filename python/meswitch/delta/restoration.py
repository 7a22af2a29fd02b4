"""From a delta back to ordinary parameters, and to an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from meswitch import reference
from meswitch.delta.directory import TENSORS, Delta
from meswitch.errors import BaseMismatchError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.shards import SHARD_BYTES, write_shards
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
    shard_bytes: int = SHARD_BYTES,
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

        def parameter(name: str) -> Tensor:
            meter.advance(0, name)
            site = opened.sites[name]
            meter.advance(site.parameters)
            return rebuild(site, checkpoint)

        sizes = {name: site.parameters * site.dtype.itemsize for name, site in opened.outline.items()}
        write_shards(folder, sizes, parameter, shard_bytes)


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
