"""Speed and memory of `compress` on a synthetic pair of checkpoints of a real model's shapes.

    python benches/compress.py [--shapes llama-3b] [--preset default] [--base-bits 4] [--folder DIR]

Writes base and fine-tune (16 bits a weight, sharded), compresses in a process of its own, samples that process's
anonymous memory, prints one JSON line, and removes the files. With `--base-bits` the base is quantized first, in the
same way, and fine-tunes are compressed against that. The values are synthetic: this says nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file


@dataclass(frozen=True)
class Shapes:
    """The shapes of a Llama, or of a mixture of experts where there are `moe_experts`, `chosen` of them by a token."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    head_dim: int = 0
    moe_experts: int = 0
    chosen: int = 0

    def config(self) -> dict[str, object]:
        fields = {"vocab_size": self.vocabulary, "hidden_size": self.hidden, "num_hidden_layers": self.layers}
        fields |= {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
        fields |= {"tie_word_embeddings": self.tied, "dtype": "bfloat16"}
        if not self.moe_experts:
            named = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            return fields | named | {"intermediate_size": self.intermediate}
        fields |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": self.head}
        fields |= {"num_experts": self.moe_experts, "num_experts_per_tok": self.chosen}
        return fields | {"moe_intermediate_size": self.intermediate}

    @property
    def head(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        wide, narrow = self.heads * self.head, self.kv_heads * self.head
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.self_attn.q_proj.weight", (wide, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (narrow, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (narrow, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, wide)
            for expert in range(self.moe_experts):
                yield from self._mlp(f"{prefix}.mlp.experts.{expert}")
            if self.moe_experts:
                yield f"{prefix}.mlp.gate.weight", (self.moe_experts, self.hidden)
                yield f"{prefix}.self_attn.q_norm.weight", (self.head,)
                yield f"{prefix}.self_attn.k_norm.weight", (self.head,)
            else:
                yield from self._mlp(f"{prefix}.mlp")
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _mlp(self, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.gate_proj.weight", (self.intermediate, self.hidden)
        yield f"{prefix}.up_proj.weight", (self.intermediate, self.hidden)
        yield f"{prefix}.down_proj.weight", (self.hidden, self.intermediate)


SHAPES = {
    "tiny": Shapes(4096, 256, 688, 4, 8, 4),
    "llama-200m": Shapes(32000, 1024, 2816, 14, 16, 8, tied=True),
    "llama-1b": Shapes(128256, 2048, 8192, 16, 32, 8, tied=True),
    "llama-3b": Shapes(128256, 3072, 8192, 28, 24, 8, tied=True),
    "mistral-7b": Shapes(32000, 4096, 14336, 32, 32, 8),
    "llama-13b": Shapes(32000, 5120, 13824, 40, 40, 40),
    "llama-70b": Shapes(128256, 8192, 28672, 80, 64, 8),
    "mixtral-8x7b": Shapes(32000, 4096, 14336, 32, 32, 8, moe_experts=8, chosen=2),
    "qwen3-30b-a3b": Shapes(151936, 2048, 768, 48, 32, 4, head_dim=128, moe_experts=128, chosen=8),
}
SHARD = 2 << 30


def write(folder: Path, name: str, *, finetune: bool) -> int:
    """A checkpoint: weights of 0.02, and of the fine-tune a change of about 0.002. Returns the number of weights."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).mul_(0.02).bfloat16()
    change = torch.randn((1 << 24) - 12345, generator=generator).mul_(0.002).bfloat16()
    folder.mkdir(parents=True)
    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    size = number = total = 0

    def flush() -> None:
        nonlocal shard, size, number
        number += 1
        save_file(shard, folder / f"model-{number:05}.safetensors")
        shard, size = {}, 0

    for key, shape in SHAPES[name].parameters():
        count = torch.Size(shape).numel()
        weight = noise.repeat(-(-count // len(noise)))[:count]
        if finetune:
            weight += change.repeat(-(-count // len(change)))[:count]
        shard[key] = weight.view(shape)
        files[key] = f"model-{number + 1:05}.safetensors"
        size, total = size + 2 * count, total + count
        if size > SHARD:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    write_config(folder, name)
    return total


def write_config(folder: Path, name: str) -> None:
    (folder / "config.json").write_text(json.dumps(SHAPES[name].config()))


def anonymous(process: int) -> int:
    """Bytes of a process's anonymous memory, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure(*arguments: object) -> dict[str, object]:
    """What a command says, and the peak of its process's anonymous memory."""
    command = [sys.executable, "-c", "from meswitch.cli import main; main()", *map(str, arguments), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{arguments[0]} failed with {process.returncode}")
    return json.loads(output) | {"peak_anonymous_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3b")
    parser.add_argument("--preset", action="append", help="may be given more than once")
    parser.add_argument("--base-bits", type=int, choices=(2, 3, 4, 8))
    parser.add_argument("--folder", type=Path, help="where the files go for the while (default: the temporary folder)")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        total = write(root / "base", arguments.shapes, finetune=False)
        base, shapes = root / "base", {"shapes": arguments.shapes, "parameters": total}
        if arguments.base_bits:
            found = measure("quantize", base, "-o", root / "quantized", "--bits", arguments.base_bits)
            print(json.dumps(shapes | found), flush=True)
            base = root / "quantized"
        write(root / "finetune", arguments.shapes, finetune=True)
        for preset in arguments.preset or ["default"]:
            found = measure("compress", base, root / "finetune", "-o", root / "delta", "--preset", preset)
            print(json.dumps(shapes | found), flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
