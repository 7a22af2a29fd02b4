"""A mixture of experts whose MoE experts do not fit in memory, in every mode, against the whole model in memory.

    python benches/moe_offload.py --folder DIR [--model DIR] [--text FILE] [--share 100 --share 50 --share 25]
                                  [--way exact --way virtual] [--tokens 24] [--rounds 5] [--cold]

The model is that of `moe.py`, with random weights, unless one is given; gates of random weights choose nearly at
random, which is the worst case for what is kept in memory. *Decode*: tokens a second of one request after its first
token, under transformers and under an engine with all MoE experts in memory, and in each way within so many percent of
their bytes; with accelerate installed also under its `device_map` with every MoE block on disk (of the random model).
Ways:

    exact            misses are read                         fallback        2-bit copies, the rest of the bytes exact
    virtual          resident MoE experts follow the text    virtual packed  the same, of 2 bits
    mixed            `meswitch moe compress` of the whole model to that share

*Found*: of matrices that were needed, those in memory; of choices, those that no copy answered, or that a gate made as
it would with all in memory. *Memory*: anonymous memory of a process that serves one request, with a KV cache of 64 MiB.
Each engine has a process of its own.
*Loss*: with a text, per cent of the whole model's NLL over windows of 128 tokens, which are asked for one after the
other, so that what is in memory follows them; the last two thirds count. Ways take turns and medians of rounds
count. With `--cold` the page cache forgets the files before each round, as if they were larger than it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from engine import PROMPT, ask, plain, seconds
from moe import write
from quantized import token_seconds
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from meswitch.compression.job import quantize
from meswitch.compression.moe_plan import plan_moe
from meswitch.compression.options import CompressOptions
from meswitch.engine.engine import Engine
from meswitch.errors import BudgetError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.documents import read_texts
from meswitch.huggingface.text import load_tokenizer, token_windows
from meswitch.moe.trunk import load_trunk

OTHER = [token + 1000 for token in PROMPT]  # which needs other MoE experts
WAYS = ("exact", "fallback", "virtual", "virtual packed", "mixed")
WINDOW, WINDOWS = 128, 60
T = TypeVar("T")


@dataclass(frozen=True)
class Way:
    """What an engine serves, and with which settings."""

    folder: Path
    settings: dict[str, Any]


def bytes_of_moe_experts(folder: Path) -> int:
    stacks = load_trunk(Checkpoint(folder))[1]
    extents = [each for module in stacks.values() for stack in module.values() for each in stack.extents]
    return sum(size + 8192 for own in extents for _, _, size in own)


def quantized(base: Path, out: Path, options: CompressOptions) -> Path:
    if not out.exists():
        quantize(base, out, options)
    return out


def ways_of(base: Path, folder: Path, whole: int, shares: list[int], asked: list[str]) -> dict[str, Way]:
    """Every way at every share that it can be had at, by name."""
    found = {"all in memory": Way(base, {})}
    folder = folder / base.absolute().parent.name  # copies of another model are others
    plan = plan_moe(str(base))
    in_two_bits = plan.moe_expert_bytes // 8 * 9 // 8  # with scales, about
    for share in shares:
        budget = whole * share // 100
        settings: dict[str, dict[str, Any]] = {
            "exact": {"moe_budget": budget},
            "fallback": {"moe_budget": budget - in_two_bits, "moe_mode": "fallback"},
            "virtual": {"moe_budget": budget, "moe_mode": "virtual"},
            "virtual packed": {"moe_budget": budget, "moe_mode": "virtual"},
        }
        for way in asked:
            name = f"{way}, {share} %"
            if way == "mixed":
                options = CompressOptions(budget_bytes=(plan.trunk_bytes + plan.moe_expert_bytes) * share // 100)
                try:
                    found[name] = Way(quantized(base, folder / f"mixed-{share}", options), {})
                except BudgetError as error:
                    print(f"{name}: {error}", file=sys.stderr)
                continue
            own = settings[way]
            if own["moe_budget"] <= 0:
                continue
            if way in ("fallback", "virtual packed"):
                own["moe_copies"] = str(quantized(base, folder / "2bit", CompressOptions(bits=2)))
            found[name] = Way(base, own)
    return found


def forget(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for path in folder.iterdir():
        if path.is_file():
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


def found_share(before: dict[str, Any], after: dict[str, Any]) -> float:
    """Of what was needed meanwhile, what was as in a whole model."""
    counts = {name: after[name] - before[name] for name in before if name in after and isinstance(after[name], int)}
    if "redirected" in counts:
        return 1 - counts["redirected"] / max(counts["choices"], 1)
    if "copied" in counts:
        return 1 - counts["copied"] / max(counts["choices"], 1)
    return float(counts["hits"] / max(counts["hits"] + counts["misses"], 1))


@torch.inference_mode()
def nll(model: Any, ids: torch.Tensor) -> float:
    logits = model(ids.unsqueeze(0), use_cache=False).logits[0, :-1].float()
    return float(cross_entropy(logits, ids[1:]))


def quality(way: Way, windows: list[torch.Tensor]) -> float:
    """Nats a token of windows that are asked for in turn, each before what is in memory has seen it."""
    with Engine(way.folder, **way.settings) as engine:
        worker, losses = engine._worker, []
        for ids in windows:
            losses.append(worker.call_plain(lambda ids=ids: nll(worker.model, ids)))
            engine.generate([ids.tolist()], max_new_tokens=1)
    settled = losses[len(losses) // 3 :]
    return sum(settled) / len(settled)


def read_windows(base: Path, text: Path) -> list[torch.Tensor]:
    tokenizer = load_tokenizer(base)
    windows = token_windows(read_texts(text, tokenizer), tokenizer, WINDOW, max_tokens=WINDOW * WINDOWS)
    return [ids for ids in windows if len(ids) == WINDOW]


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function in a process of its own: several engines share the threads of OpenMP, and are slower."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def plain_decode(base: Path, tokens: int, *, disk: bool) -> dict[str, float]:
    model = on_disk(base) if disk else AutoModelForCausalLM.from_pretrained(base)
    return {"seconds": plain_seconds(model, tokens), "memory": anonymous_memory()}


def decode(way: Way, tokens: int) -> dict[str, float]:
    with Engine(way.folder, kv_budget="64MiB", **way.settings) as engine:
        ask(engine, OTHER, ["base"], tokens)  # what is then in memory is what a stream finds
        before = engine.stats()["moe"]
        measured = {"seconds": token_seconds(engine, ["base"], tokens), "memory": anonymous_memory()}
        if before is not None:
            measured["found"] = found_share(before, engine.stats()["moe"])
        return measured


def anonymous_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(ways: dict[str, Way], tokens: int, rounds: int, *, cold: bool, random: bool) -> dict[str, Any]:
    """Medians of rounds, in which all ways take turns."""
    base = ways["all in memory"].folder
    measured: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for name, disk in [("transformers", False), ("accelerate, disk", True)]:
            if not disk or (random and find_spec("accelerate") is not None):
                measured.setdefault(name, []).append(apart(partial(plain_decode, disk=disk), base, tokens))
        for name, way in ways.items():
            if cold:
                forget(way.folder)
            measured.setdefault(name, []).append(apart(decode, way, tokens))
    medians = {
        name: {what: statistics.median(one[what] for one in some) for what in some[0]}
        for name, some in measured.items()
    }
    stock = medians["transformers"]["seconds"]
    return {
        "decode": {name: round(1 / own["seconds"], 2) for name, own in medians.items()},
        "decode / transformers": {name: round(stock / own["seconds"], 3) for name, own in medians.items()},
        "found": {name: round(own["found"], 3) for name, own in medians.items() if "found" in own},
        "memory": {name: int(own["memory"]) for name, own in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keep the files there")
    parser.add_argument("--model", type=Path, help="another model than the random one")
    parser.add_argument("--text", type=Path, help="what to measure the loss on: .txt or .jsonl")
    parser.add_argument("--share", type=int, action="append", help="percent of all MoE experts; may be given again")
    parser.add_argument("--way", action="append", choices=WAYS, help="may be given again (default: exact)")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    given = parser.parse_args()
    base = given.model or given.folder / "base"
    if given.model is None and not base.exists():
        write(base)
    whole = bytes_of_moe_experts(base)
    ways = ways_of(base, given.folder, whole, given.share or [100, 50, 25], given.way or ["exact"])
    found = measure(ways, given.tokens, given.rounds, cold=given.cold, random=given.model is None)
    if given.text:
        windows = read_windows(base, given.text)
        losses = {name: apart(quality, way, windows) for name, way in ways.items()}
        full = losses["all in memory"]
        found["loss"] = {name: round(100 * (value / full - 1), 3) for name, value in losses.items()}
    print(json.dumps({"cold": given.cold, "moe_expert_bytes": whole} | found))


if __name__ == "__main__":
    main()
