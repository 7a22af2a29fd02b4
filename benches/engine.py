"""Tokens a second of the engine, as ratios of one run: experts against the base, a mixed batch against one by one.

    python benches/engine.py [--shapes llama-1b] [--preset default] [--experts 8] [--tokens 12] [--folder DIR]

Synthetic weights of a real model's shapes (speed does not look at values). The base alone is timed under transformers'
own `generate` and under the engine; then one expert, then one request for each of several experts in one batch. Rounds
take turns, because machines drift, and medians count. *Decode* is what a token costs after the first one, *prefill*
what 512 tokens of one prompt take, *job* everything from nothing in memory to the last answer: the engine with its
experts, or one restored model after the other, loaded, asked, dropped. With `--folder` the files stay there, and the
next run writes none.
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

from meswitch.compression.job import compress
from meswitch.compression.options import CompressOptions
from meswitch.engine.engine import Engine

PROMPT = list(range(100, 116))
LONG = [100 + at % 1000 for at in range(512)]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    """Base and experts under one engine, and the base under transformers."""

    def __init__(self, root: Path, preset: str, experts: int) -> None:
        self.root, self.preset = root, preset
        self.names = [f"expert-{at}" for at in range(experts)]

    def measure(self, tokens: int, rounds: int) -> dict[str, Any]:
        with self.engine() as engine:
            model = self.model()
            decode = self.decode(engine, model, tokens, rounds)
            prefill = self.prefill(engine, model, rounds)
        del model
        return {"decode": ratios(decode, len(self.names)), "prefill": prefill, "job": self.job(tokens)}

    def engine(self) -> Engine:
        experts = {name: self.root / self.preset / name for name in self.names}
        return Engine(self.root / "base", experts=experts)

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.root / "base")

    def decode(self, engine: Engine, model: Any, tokens: int, rounds: int) -> dict[str, list[float]]:
        """Seconds a token after the first one."""
        cases: dict[str, Callable[[int], None]] = {
            "transformers, base": lambda count: plain(model, PROMPT, count),
            "engine, base": lambda count: ask(engine, PROMPT, ["base"], count),
            "engine, one expert": lambda count: ask(engine, PROMPT, self.names[:1], count),
            "engine, mixed": lambda count: ask(engine, PROMPT, self.names, count),
        }
        spent: dict[str, list[float]] = {}
        for at in range(rounds + 1):  # the first is not counted
            for case, of in cases.items():
                first, all_of_them = seconds(lambda of=of: of(1)), seconds(lambda of=of: of(tokens))
                if at:
                    spent.setdefault(case, []).append((all_of_them - first) / (tokens - 1))
        return spent

    def prefill(self, engine: Engine, model: Any, rounds: int) -> dict[str, float]:
        """Tokens a second of a prompt of 512; a new first token each time, so that nothing is cached."""
        cases: dict[str, Callable[[list[int]], None]] = {
            "transformers, base": lambda prompt: plain(model, prompt, 1),
            "engine, base": lambda prompt: ask(engine, prompt, ["base"], 1),
            "engine, one expert": lambda prompt: ask(engine, prompt, self.names[:1], 1),
        }
        spent: dict[str, list[float]] = {case: [] for case in cases}
        for at in range(rounds + 1):
            for case, of in cases.items():
                spent[case].append(seconds(lambda of=of, at=at: of([at + 1, *LONG[1:]])))
        rate = {case: len(LONG) / statistics.median(some[1:]) for case, some in spent.items()}
        own = rate["engine, one expert"]
        return {case: round(value, 1) for case, value in rate.items()} | {
            "one expert / transformers' base": round(own / rate["transformers, base"], 3),
            "one expert / engine's base": round(own / rate["engine, base"], 3),
        }

    def job(self, tokens: int) -> dict[str, float]:
        """Seconds from nothing in memory to the last answer, files in the page cache; the median of three."""

        def together() -> None:
            with self.engine() as engine:
                ask(engine, PROMPT, self.names, tokens)

        def one_by_one() -> None:
            for _ in self.names:  # a restored model weighs what the base does
                plain(self.model(), PROMPT, tokens)

        both = [(seconds(together), seconds(one_by_one)) for _ in range(3)]
        engine, restored = (statistics.median(some) for some in zip(*both, strict=True))
        return {"engine": round(engine, 2), "restored": round(restored, 2), "ratio": round(restored / engine, 3)}


def plain(model: Any, prompt: list[int], count: int) -> None:
    settings = {"do_sample": False, "pad_token_id": 0}
    model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, **settings)


def ask(engine: Engine, prompt: list[int], experts: list[str], count: int) -> None:
    answers = engine.generate([prompt] * len(experts), expert=experts, max_new_tokens=count)
    assert all(len(answer.token_ids) == count for answer in answers)


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
            compress(root / "base", root / "finetune", first, CompressOptions(preset=preset))
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
            found = Bench(root, preset, arguments.experts).measure(arguments.tokens, arguments.rounds)
            print(json.dumps({"shapes": arguments.shapes, "preset": preset} | found), flush=True)
    finally:
        if arguments.folder is None:
            shutil.rmtree(root)


if __name__ == "__main__":
    main()
