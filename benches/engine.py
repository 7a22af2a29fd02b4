"""Tokens a second of the engine, as ratios of one run: experts against the base, a mixed batch against one by one.

    python benches/engine.py [--shapes llama-1b] [--preset default] [--experts 8] [--tokens 12] [--folder DIR]

Synthetic weights of a real model's shapes (speed does not look at values). The base alone is timed under transformers'
own `generate` and under the engine; then one expert, then one request for each of several experts in one batch. Rounds
take turns, because machines drift, and medians count. *Decode* is what a token costs after the first one. With
`--folder` the files stay there, and the next run writes none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compress import SHAPES, write

from meswitch.compress import compress
from meswitch.engine import Engine

PROMPT = list(range(100, 116))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(root: Path, preset: str, experts: int, tokens: int, rounds: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    names = [f"expert-{at}" for at in range(experts)]
    whole: dict[str, list[float]] = {}
    decode: dict[str, list[float]] = {}
    with Engine(root / "base", experts={name: root / preset / name for name in names}) as engine:
        model = AutoModelForCausalLM.from_pretrained(root / "base")
        settings = {"do_sample": False, "pad_token_id": 0}

        def plain(count: int) -> None:
            model.generate(torch.tensor([PROMPT]), max_new_tokens=count, min_new_tokens=count, **settings)

        def ask(expert: list[str], count: int) -> None:
            answers = engine.generate([PROMPT] * len(expert), expert=expert, max_new_tokens=count)
            assert all(len(answer.token_ids) == count for answer in answers)

        cases: dict[str, Callable[[int], None]] = {
            "transformers, base": plain,
            "engine, base": lambda count: ask(["base"], count),
            "engine, one expert": lambda count: ask(names[:1], count),
            "engine, mixed": lambda count: ask(names, count),
        }
        for at in range(rounds + 1):  # the first is not counted
            for case, of in cases.items():
                first, all_of_them = seconds(lambda of=of: of(1)), seconds(lambda of=of: of(tokens))
                if at:
                    whole.setdefault(case, []).append(all_of_them / tokens)
                    decode.setdefault(case, []).append((all_of_them - first) / (tokens - 1))
    return {"whole": ratios(whole, experts), "decode": ratios(decode, experts)}


def ratios(times: dict[str, list[float]], experts: int) -> dict[str, Any]:
    rate = {case: 1 / statistics.median(spent) for case, spent in times.items()}
    rate["engine, mixed"] *= experts
    return {
        "tokens_per_second": {case: round(value, 2) for case, value in rate.items()},
        "one expert / transformers' base": round(rate["engine, one expert"] / rate["transformers, base"], 3),
        "one expert / engine's base": round(rate["engine, one expert"] / rate["engine, base"], 3),
        "mixed / restored models one after the other": round(rate["engine, mixed"] / rate["transformers, base"], 3),
    }


def prepare(root: Path, shapes: str, presets: list[str], experts: int) -> None:
    """Writes what is not there yet: the base, and for each preset its experts."""
    if not (root / "base").exists():
        write(root / "base", shapes, finetune=False)
    for preset in presets:
        first = root / preset / "expert-0"
        if not first.exists():
            if not (root / "finetune").exists():
                write(root / "finetune", shapes, finetune=True)
            compress(root / "base", root / "finetune", first, preset=preset)
        for at in range(1, experts):  # the same delta under other names: other memory is what counts
            if not (root / preset / f"expert-{at}").exists():
                shutil.copytree(first, root / preset / f"expert-{at}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-1b")
    parser.add_argument("--preset", action="append", help="may be given more than once")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the files there")
    arguments = parser.parse_args()
    presets = arguments.preset or ["default"]
    root = arguments.folder or Path(tempfile.mkdtemp())
    try:
        prepare(root, arguments.shapes, presets, arguments.experts)
        for preset in presets:
            found = measure(root, preset, arguments.experts, arguments.tokens, arguments.rounds)
            print(json.dumps({"shapes": arguments.shapes, "preset": preset} | found), flush=True)
    finally:
        if arguments.folder is None:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
