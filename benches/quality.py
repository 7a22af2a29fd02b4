"""Recovered share and KL of every preset on the tiny family's held-out text, with and without distillation.

    python benches/quality.py [--preset default --preset small] [--seed 0] [--tokens 16384] [--no-distill]

Trains the family if it is not cached. Prints a markdown table: bits a weight, recovered share in per cent and
KL(fine-tune ‖ expert) in thousandths of a nat per token, for each domain.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from meswitch.calibration import calibrate
from meswitch.compress import PRESETS, compress
from meswitch.demo.family import family
from meswitch.distill import distill
from meswitch.evaluate import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", action="append", choices=PRESETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--no-distill", action="store_true")
    arguments = parser.parse_args()
    tiny = family("tiny", seed=arguments.seed)
    seen = {name: calibrate(path, tiny.calibration[name]) for name, path in tiny.experts.items()}
    print(f"| preset | {' | '.join(tiny.experts)} | mean |")
    print("|---|" + "---|" * (len(tiny.experts) + 1))
    with tempfile.TemporaryDirectory() as folder:
        for preset in arguments.preset or PRESETS:
            rows: dict[str, list[tuple[float, float, float]]] = {}
            for name, finetune in tiny.experts.items():
                delta = Path(folder) / preset / name
                report = compress(tiny.base, finetune, delta, preset=preset, calibration=seen[name])
                for label in ("", ", distilled")[: 1 if arguments.no_distill else 2]:
                    if label:
                        distill(tiny.base, finetune, delta, delta, tiny.calibration[name], seed=arguments.seed)
                    found = evaluate(tiny.base, delta, finetune, tiny.heldout[name], max_tokens=arguments.tokens)
                    row = (report.bpw, 100 * (found.recovered_share or 0.0), 1000 * found.kl)
                    rows.setdefault(preset + label, []).append(row)
            for label, row in rows.items():
                cells = [f"{bpw:.2f} bpw, {share:.2f} %, {kl:.2f}" for bpw, share, kl in row]
                mean = [sum(column) / len(row) for column in zip(*row, strict=True)]
                cells.append(f"{mean[0]:.2f} bpw, {mean[1]:.2f} %")
                print(f"| {label} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
