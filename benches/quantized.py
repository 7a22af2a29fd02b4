"""A quantized base under the engine, as ratios of one run: against the 16-bit base, and against llama.cpp.

    python benches/quantized.py --folder DIR [--shapes llama-1b] [--bits 4] [--preset default --preset small]
                                [--experts 8] [--tokens 24] [--rounds 5]

Synthetic weights of a real model's shapes (speed does not look at values). Timed are the engine with the 16-bit base,
alone; the engine with the quantized base, alone, and with one expert; and one request for each of several experts in
one batch. Engines take turns, one at a time, and medians of rounds count. *Decode* is what a token costs after the
first one, *prefill* what a prompt of 512 tokens takes, *load* from nothing in memory to an engine that is ready, files
in the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from compress import SHAPES, write
from engine import LONG, PROMPT, ask, seconds

from meswitch.compression.job import compress, quantize
from meswitch.compression.options import CompressOptions
from meswitch.engine.engine import Engine


def prepare(root: Path, shapes: str, bits: int, presets: list[str], experts: int) -> None:
    """Writes what is not there yet: the base at 16 and at fewer bits, and for each preset its experts."""
    quantized = root / f"base-{bits}bit"
    if not (root / "base").exists():
        write(root / "base", shapes, finetune=False)
    if not quantized.exists():
        print(json.dumps(quantize(root / "base", quantized, CompressOptions(bits=bits)).to_json()), flush=True)
    for preset in presets:
        of = root / f"{preset}-{bits}bit"
        if not (of / "expert-0").exists():
            if not (root / "finetune").exists():
                write(root / "finetune", shapes, finetune=True)
            report = compress(quantized, root / "finetune", of / "expert-0", CompressOptions(preset=preset))
            print(json.dumps(report.to_json()), flush=True)
        for at in range(1, experts):  # the same delta under other names: other memory is what counts
            if not (of / f"expert-{at}").exists():
                shutil.copytree(of / "expert-0", of / f"expert-{at}")


class Rounds:
    """Seconds by case, one entry a round."""

    def __init__(self) -> None:
        self.decode: dict[str, list[float]] = {}
        self.prefill: dict[str, list[float]] = {}
        self.load: dict[str, list[float]] = {}

    def run(self, base: Path, experts: dict[str, Path], cases: dict[str, list[str]], tokens: int, at: int) -> None:
        """One round of an engine, which is alone in the process: two would share the kernels' threads."""
        start = time.perf_counter()
        with Engine(base, experts) as engine:
            self.load.setdefault(base.name, []).append(time.perf_counter() - start)
            for case, asked in cases.items():
                ask(engine, PROMPT, asked, 2)  # experts are loaded, and modules that share an input have met
                self.decode.setdefault(case, []).append(token_seconds(engine, asked, tokens))
                if len(asked) == 1:
                    self.prefill.setdefault(case, []).append(prompt_seconds(engine, asked, at + 1))


def measure(root: Path, bits: int, preset: str, experts: int, tokens: int, rounds: int) -> dict[str, Any]:
    names = [f"expert-{at}" for at in range(experts)]
    folders = {name: root / f"{preset}-{bits}bit" / name for name in names}
    dense, packed = "16 bits, base", f"{bits} bits"
    spent = Rounds()
    for at in range(rounds):
        spent.run(root / "base", {}, {dense: ["base"]}, tokens, at)
        cases = {f"{packed}, base": ["base"], f"{packed}, one expert": names[:1], f"{packed}, mixed": names}
        spent.run(root / f"base-{bits}bit", folders, cases, tokens, at)
    rate = {case: 1 / statistics.median(some) for case, some in spent.decode.items()}
    rate[f"{packed}, mixed"] *= experts
    read = {case: len(LONG) / statistics.median(some) for case, some in spent.prefill.items()}
    return {
        "decode": {case: round(value, 2) for case, value in rate.items()},
        "decode / 16 bits": {case: round(value / rate[dense], 3) for case, value in rate.items()},
        "prefill": {case: round(value, 1) for case, value in read.items()},
        "prefill / 16 bits": {case: round(value / read[dense], 3) for case, value in read.items()},
        "load": {folder: round(statistics.median(some), 2) for folder, some in spent.load.items()},
    }


def token_seconds(engine: Engine, experts: list[str], tokens: int) -> float:
    """Seconds a token after the first one."""
    first, whole = (seconds(lambda count=count: ask(engine, PROMPT, experts, count)) for count in (1, tokens))
    return (whole - first) / (tokens - 1)


def prompt_seconds(engine: Engine, experts: list[str], first: int) -> float:
    """Seconds of a prompt of 512 tokens; of another first token than before, so that nothing is cached."""
    return seconds(lambda: ask(engine, [first, *LONG[1:]], experts, 1))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments of this bench and of the one beside llama.cpp."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keep the files there")
    parser.add_argument("--shapes", choices=SHAPES, default="llama-1b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--preset", action="append", help="may be given more than once")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    root, bits, presets = arguments.folder, arguments.bits, arguments.preset or ["default", "small"]
    prepare(root, arguments.shapes, bits, presets, arguments.experts)
    for preset in presets:
        found = measure(root, bits, preset, arguments.experts, arguments.tokens, arguments.rounds)
        print(json.dumps({"shapes": arguments.shapes, "preset": preset} | found), flush=True)


if __name__ == "__main__":
    main()
