"""Made `v1/` once, with format version 1. Never run it again over a folder that stands: every later version must read
what is there. A new format version gets a folder of its own.

    python tests/golden/make.py v1
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from families import config_of, save_finetune, save_random  # noqa: E402
from meswitch.compress import compress, restore  # noqa: E402


def main(folder: Path) -> None:
    folder.mkdir()
    base = save_random(folder / "base", config_of("llama", num_hidden_layers=1, vocab_size=264))
    finetune = save_finetune(folder / "finetune", base, seed=1, grow=3)
    for checkpoint in (base, finetune):
        narrow = {name: tensor.bfloat16() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
        same = "model.layers.0.self_attn.o_proj.weight"
        if checkpoint == finetune:
            narrow[same] = load_file(base / "model.safetensors")[same]
        save_file(narrow, checkpoint / "model.safetensors", metadata={"format": "pt"})
    for preset in ("default", "small", "me-switch", "bitdelta"):
        compress(base, finetune, folder / preset, preset=preset)
        restore(base, folder / preset, folder / "restored")
        (folder / "restored" / "model.safetensors").rename(folder / f"{preset}.safetensors")
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
    main(HERE / sys.argv[1])
