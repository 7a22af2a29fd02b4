"""A mixture of experts whose MoE experts do not fit in memory, against the whole model in memory.

    python benches/moe_offload.py --folder DIR [--share 100 --share 50 --share 25] [--tokens 24] [--rounds 5] [--cold]

The model is that of `moe.py`, with random weights; its gates choose nearly at random, which is the worst case for what
is kept in memory. *Decode*: tokens a second of one request after its first token, under transformers and under an
engine without and with a budget of so many percent of all MoE experts; with accelerate installed also under its
`device_map` with every MoE block on disk. *Hits*: of matrices that were needed, those in memory. *Memory*: anonymous
memory of a process that serves one request, with a KV cache of 64 MiB. Engines take turns and medians of rounds count.
With `--cold` the page cache forgets the files before each round, as if they were larger than it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine import PROMPT, ask, plain, seconds
from moe import write
from quantized import token_seconds
from transformers import AutoModelForCausalLM

from meswitch.engine.engine import Engine
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.moe.trunk import load_trunk

OTHER = [token + 1000 for token in PROMPT]  # which needs other MoE experts

MEMORY = """
import sys
from meswitch.engine.engine import Engine
with Engine(sys.argv[1], kv_budget="64MiB", moe_budget=int(sys.argv[2]) or None) as engine:
    engine.generate([list(range(100, 116))], max_new_tokens=16)
    print(open("/proc/self/status").read())
"""


def bytes_of_moe_experts(folder: Path) -> int:
    stacks = load_trunk(Checkpoint(folder))[1]
    extents = [each for module in stacks.values() for stack in module.values() for each in stack.extents]
    return sum(size + 8192 for own in extents for _, _, size in own)


def memory(folder: Path, budget: int) -> int:
    command = [sys.executable, "-c", MEMORY, str(folder), str(budget)]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found = re.search(r"RssAnon:\s+(\d+)", said)
    assert found is not None
    return int(found[1]) * 1024


def forget(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_seconds(model: Any, tokens: int) -> float:
    plain(model, PROMPT, tokens)  # its files are mapped, and read when they are first used
    first, whole = (seconds(lambda count=count: plain(model, PROMPT, count)) for count in (1, tokens))
    return (whole - first) / (tokens - 1)


def on_disk(folder: Path) -> Any:
    """The model with the blocks of MoE experts on disk, by accelerate."""
    config = json.loads((folder / "config.json").read_text())
    layers = range(config["num_hidden_layers"])
    parts = ("self_attn", "input_layernorm", "post_attention_layernorm")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{layer}.{part}": "cpu" for layer in layers for part in parts}
    device_map |= {f"model.layers.{layer}.mlp": "disk" for layer in layers}
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=folder / "offload")


def measure(folder: Path, shares: list[int], tokens: int, rounds: int, *, cold: bool) -> dict[str, Any]:
    whole = bytes_of_moe_experts(folder)
    budgets = {"all in memory": 0} | {f"{share} %": whole * share // 100 for share in shares}
    spent: dict[str, list[float]] = {}
    hits = {}
    for _ in range(rounds):
        model = AutoModelForCausalLM.from_pretrained(folder)
        spent.setdefault("transformers", []).append(plain_seconds(model, tokens))
        del model
        if find_spec("accelerate") is not None:
            spent.setdefault("accelerate, disk", []).append(plain_seconds(on_disk(folder), tokens))
        for name, budget in budgets.items():
            if cold:
                forget(folder)
            with Engine(folder, moe_budget=budget or None) as engine:
                ask(engine, OTHER, ["base"], tokens)  # what is then in memory is what a stream finds
                before = engine.stats()["moe"]
                spent.setdefault(name, []).append(token_seconds(engine, ["base"], tokens))
                after = engine.stats()["moe"]
                if after is not None:
                    found, missed = (after[count] - before[count] for count in ("hits", "misses"))
                    hits[name] = round(found / (found + missed), 3)
    rate = {name: 1 / statistics.median(some) for name, some in spent.items()}
    return {
        "moe_expert_bytes": whole,
        "decode": {name: round(value, 2) for name, value in rate.items()},
        "decode / transformers": {name: round(value / rate["transformers"], 3) for name, value in rate.items()},
        "hits": hits,
        "memory": {name: memory(folder, budget) for name, budget in budgets.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keep the files there")
    parser.add_argument("--share", type=int, action="append", help="percent of all MoE experts; may be given again")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.folder / "base"
    if not folder.exists():
        write(folder)
    shares = arguments.share or [100, 50, 25]
    found = measure(folder, shares, arguments.tokens, arguments.rounds, cold=arguments.cold)
    print(json.dumps({"cold": arguments.cold} | found))


if __name__ == "__main__":
    main()
