"""A mixture of experts over a quantized base under the engine, against the same at 16 bits.

    python benches/moe.py --folder DIR [--bits 4 --bits 2] [--fine-tunes 4] [--tokens 24] [--rounds 5]

Random weights in the shapes of a Qwen3-MoE of 1.4 billion parameters, 64 MoE experts of which 8 are chosen (speed does
not look at values). *One stream*: tokens a second of one request after its first token; *eight*: of eight requests in
one batch, all of them together; *memory*: anonymous memory of a process that serves one request, with a KV cache of
64 MiB. *Fine-tunes*: requests for so many fine-tunes (`default`), one each, in one batch, and one after the other; each
has memory of its own. Engines take turns, one at a time, and medians of rounds count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from engine import PROMPT, ask
from quantized import token_seconds
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from meswitch.compression.job import compress, quantize
from meswitch.compression.options import CompressOptions
from meswitch.engine.engine import Engine

MEMORY = """
import re, sys
from meswitch.engine.engine import Engine
with Engine(sys.argv[1], kv_budget="64MiB") as engine:
    engine.generate([list(range(100, 116))], max_new_tokens=4)
    print(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def write(folder: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=32000,
        hidden_size=1024,
        num_hidden_layers=14,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=448,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def write_fine_tunes(base: Path, folder: Path, count: int) -> None:
    """The delta of one fine-tune, under several names: other memory is what counts."""
    first = folder / "0"
    if not first.exists():
        tuned = base.parent / "finetune"
        shutil.copytree(base, tuned)
        weights = load_file(tuned / "model.safetensors")
        generator = torch.Generator().manual_seed(1)
        for weight in weights.values():
            if weight.dim() > 1:
                weight += torch.randn(weight.shape, generator=generator).mul_(0.002).to(weight.dtype)
        save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
        compress(base, tuned, first)
        shutil.rmtree(tuned)
    for number in range(1, count):
        if not (folder / str(number)).exists():
            shutil.copytree(first, folder / str(number))


def memory(folder: Path) -> int:
    done = subprocess.run([sys.executable, "-c", MEMORY, folder], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def measure(folders: dict[str, Path], experts: Path, count: int, tokens: int, rounds: int) -> dict[str, Any]:
    cases = ("one stream", "eight", "fine-tunes, one batch", "fine-tunes, in turn")
    spent: dict[str, dict[str, list[float]]] = {name: {case: [] for case in cases} for name in folders}
    names = [str(number) for number in range(count)]
    for _ in range(rounds):
        for name, folder in folders.items():
            with Engine(folder, experts, allow_quantized_base=True) as engine:
                ask(engine, PROMPT, ["base"], 2)
                ask(engine, PROMPT, names, 2)
                for case, number in (("one stream", 1), ("eight", 8)):
                    spent[name][case].append(token_seconds(engine, ["base"] * number, tokens) / number)
                in_turn = [token_seconds(engine, [expert], tokens) for expert in names]
                spent[name]["fine-tunes, in turn"].append(statistics.fmean(in_turn))
                spent[name]["fine-tunes, one batch"].append(token_seconds(engine, names, tokens) / count)
    return {
        name: {case: round(1 / statistics.median(some), 2) for case, some in of.items()}
        | {"memory": memory(folders[name])}
        for name, of in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keep the files there")
    parser.add_argument("--bits", type=int, action="append", help="may be given more than once")
    parser.add_argument("--fine-tunes", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folders = {"16 bits": arguments.folder / "base"}
    if not folders["16 bits"].exists():
        write(folders["16 bits"])
    for bits in arguments.bits or [4, 2]:
        folders[f"{bits} bits"] = folder = arguments.folder / f"base-{bits}bit"
        if not folder.exists():
            print(json.dumps(quantize(folders["16 bits"], folder, CompressOptions(bits=bits)).to_json()), flush=True)
    experts = arguments.folder / "fine-tunes"
    write_fine_tunes(folders["16 bits"], experts, arguments.fine_tunes)
    print(json.dumps(measure(folders, experts, arguments.fine_tunes, arguments.tokens, arguments.rounds)))


if __name__ == "__main__":
    main()
