"""Made `v1/` to `v4/` once, with the format versions of their names, and `v4-base/`, a quantized model. Never run it
again over a folder that stands: every later version must read what is there. A new format version gets a folder of its
own.

    python tests/golden/make.py v4
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from families import config_of, save_finetune, save_random  # noqa: E402
from meswitch.compression.job import compress, quantize  # noqa: E402
from meswitch.compression.options import CompressOptions  # noqa: E402
from meswitch.delta.restoration import restore  # noqa: E402

SAME, DENSE = "model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.up_proj.weight"
# By version: how each delta directory is made. Version 2 brought sparse entries, version 3 tiled codes,
# version 4 the binding, and codes and scales in lines.
MADE: dict[str, dict[str, dict[str, Any]]] = {
    "v1": {preset: {"preset": preset} for preset in ("default", "small", "me-switch", "bitdelta")},
    "v2": {"sparse": {"preset": "default"}},
    "v3": {"default": {"preset": "default"}, "small": {"preset": "small"}, "wide": {"preset": "small", "bits": 8}},
    "v4": {"default": {"preset": "default"}, "small": {"preset": "small"}, "wide": {"preset": "small", "bits": 8}},
    "v4-base": {"quantized": {"bits": 4}},
}


def tuned(name: str, base: Tensor, tensor: Tensor, sparse: bool) -> Tensor:
    """What the fine-tune has at `name`: one matrix is the base's own; in a sparse one others change here and there."""
    if name == SAME:
        return base
    if not sparse or name == DENSE or tensor.dim() < 2:
        return tensor
    kept = torch.zeros(tensor.shape, dtype=torch.bool)
    kept.view(-1)[5::41] = True
    kept[3:20] = False
    kept[base.shape[0] :] = True
    padded = torch.cat([base, tensor[base.shape[0] :]])
    return tensor.where(kept, padded)


def main(version: str) -> None:
    folder = HERE / version
    folder.mkdir()
    base = save_random(folder / "base", config_of("llama", num_hidden_layers=1, vocab_size=264))
    finetune = save_finetune(folder / "finetune", base, seed=1, grow=3)
    ours, theirs = (
        {name: tensor.bfloat16() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
        for checkpoint in (base, finetune)
    )
    theirs = {name: tuned(name, ours[name], tensor, version == "v2") for name, tensor in theirs.items()}
    for checkpoint, tensors in ((base, ours), (finetune, theirs)):
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for name, settings in MADE[version].items():
        if version == "v4-base":
            quantize(base, folder / name, CompressOptions(**settings))
            restore(None, folder / name, folder / "restored")
        else:
            compress(base, finetune, folder / name, CompressOptions(**settings))
            restore(base, folder / name, folder / "restored")
        (folder / "restored" / "model.safetensors").rename(folder / f"{name}.safetensors")
        for left in (folder / "restored").iterdir():
            left.unlink()
        (folder / "restored").rmdir()
    for checkpoint in (base, finetune):
        for file in checkpoint.iterdir():
            if checkpoint == finetune or file.name not in ("model.safetensors", "config.json"):
                file.unlink()
    finetune.rmdir()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
