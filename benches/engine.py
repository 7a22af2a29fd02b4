"""Tokens a second of the engine, as ratios of one run: experts against the base, a mixed batch against one by one.

    python benches/engine.py [--shapes llama-1b] [--preset default] [--experts 8] [--tokens 32]

Synthetic weights of a real model's shapes (speed does not look at values). The base alone is timed under transformers'
own `generate` and under the engine; then one expert, then one request for each of several experts in one batch. Medians
of rounds that take turns, because machines drift.
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


def measure(root: Path, experts: int, tokens: int, rounds: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    names = [f"expert-{at}" for at in range(experts)]
    for name in names[1:]:  # the same delta under other names: other memory is what counts
        shutil.copytree(root / "experts" / names[0], root / "experts" / name)
    times: dict[str, list[float]] = {}
    with Engine(root / "base", experts=root / "experts") as engine:

        def ask(expert: list[str]) -> None:
            answers = engine.generate([PROMPT] * len(expert), expert=expert, max_new_tokens=tokens)
            assert all(len(answer.token_ids) == tokens for answer in answers)

        ask([*names, "base"])
        for _ in range(rounds):
            for case, of in (("engine, base", ["base"]), ("engine, one expert", names[:1]), ("engine, mixed", names)):
                times.setdefault(case, []).append(seconds(lambda of=of: ask(of)))
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    ids = torch.tensor([PROMPT])
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    for at in range(rounds + 1):
        spent = seconds(lambda: model.generate(ids, **settings))
        if at:
            times.setdefault("transformers, base", []).append(spent)
    rate = {case: tokens / statistics.median(spent) for case, spent in times.items()}
    rate["engine, mixed"] *= experts
    return {
        "tokens_per_second": {case: round(value, 2) for case, value in rate.items()},
        "one expert / transformers' base": round(rate["engine, one expert"] / rate["transformers, base"], 3),
        "one expert / engine's base": round(rate["engine, one expert"] / rate["engine, base"], 3),
        "mixed / restored models one after the other": round(rate["engine, mixed"] / rate["transformers, base"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="llama-1b")
    parser.add_argument("--preset", action="append", help="may be given more than once")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        write(root / "base", arguments.shapes, finetune=False)
        write(root / "finetune", arguments.shapes, finetune=True)
        for preset in arguments.preset or ["default"]:
            shutil.rmtree(root / "experts", ignore_errors=True)
            compress(root / "base", root / "finetune", root / "experts" / "expert-0", preset=preset)
            found = measure(root, arguments.experts, arguments.tokens, arguments.rounds)
            print(json.dumps({"shapes": arguments.shapes, "preset": preset} | found), flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
