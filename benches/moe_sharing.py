"""What several fine-tunes of one mixture of experts keep in little more memory than one of them takes.

    python benches/moe_sharing.py [--budget 1.15 --budget 1.35] [--bits 1 --bits 2] [--tokens 8192] [--into FILE.md]

The MoE family's three fine-tunes, by the plans of `meswitch moe share`: *bytes* of base and deltas in units of one
model at 16 bits; *kept*: the share of the gain from base to fine-tune on held-out text of each one's own domain. Deltas
are calibrated on other text of that domain. They are also measured at one width for every matrix, against one of the
models, the base, and the base in 4 bits. `--into` puts the table between the lines BEGIN and END of a text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import TypeAlias

from quality import put

from meswitch.compression.calibration import Calibration, calibrate
from meswitch.compression.evaluation import evaluate
from meswitch.compression.job import compress, quantize
from meswitch.compression.options import CompressOptions
from meswitch.compression.sharing import SharingPlan, share
from meswitch.demo.family import Family, family
from meswitch.errors import BudgetError

BEGIN, END = "<!-- benches/moe_sharing.py: begin -->", "<!-- benches/moe_sharing.py: end -->"
Row: TypeAlias = Callable[[str, int, Path, dict[str, Path]], str]

PRESETS = {1: "small", 2: "default"}
PLANS: tuple[SharingPlan, ...] = ("owners", "medoids", "deltas")


def kept(made: Family, base: Path, experts: dict[str, Path], tokens: int) -> dict[str, float]:
    """The share of its gain that each fine-tune keeps."""
    found = {}
    for name, delta in experts.items():
        scores = evaluate(base, delta, made.experts[name], made.heldout[name], baseline=made.base, max_tokens=tokens)
        assert scores.recovered_share is not None
        found[name] = 100 * scores.recovered_share
    return found


def rows(made: Family, budgets: list[float], widths: list[int], tokens: int, folder: Path) -> Iterator[str]:
    one = sum(file.stat().st_size for file in made.base.glob("*.safetensors"))
    calibrations = {name: calibrate(path, made.calibration[name]) for name, path in made.experts.items()}

    def row(what: str, size: int, base: Path, experts: dict[str, Path]) -> str:
        shares = kept(made, base, experts, tokens)
        cells = [
            what,
            f"{size / one:.2f}",
            *(f"{share:.1f}" for share in shares.values()),
            f"{mean(shares.values()):.1f}",
        ]
        return f"| {' | '.join(cells)} |"

    for plan in PLANS:
        for budget in budgets:
            out = folder / f"{plan}-{budget}"
            try:
                report = share(made.experts, out, int(budget * one), plan=plan, calibrations=calibrations)
            except BudgetError as error:
                print(f"{plan} at {budget}: {error}", flush=True)
                continue
            yield row(f"`{plan}`", report.bytes, report.base, report.experts)
    calibration = calibrate(made.base, made.calibration["prose"])
    quantize(made.base, folder / "base-4bit", CompressOptions(bits=4), calibration=calibration)
    for bits in widths:
        for name, base in (
            ("one of them", made.experts["prose"]),
            ("the base", made.base),
            ("4-bit base", folder / "base-4bit"),
        ):
            yield deltas(
                made, row, folder / f"{bits}-{base.name}", base, bits, calibrations, f"{bits} bits against {name}"
            )


def deltas(
    made: Family, row: Row, out: Path, base: Path, bits: int, calibrations: dict[str, Calibration], what: str
) -> str:
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    for name, model in made.experts.items():
        report = compress(base, model, out / name, PRESETS[bits], calibration=calibrations[name])
        size += report.bytes
    return row(what, size, base, {name: out / name for name in made.experts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget", type=float, action="append", help="in units of one model; may be given more than once"
    )
    parser.add_argument("--bits", type=int, action="append", choices=PRESETS, help="may be given more than once")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--into", type=Path, metavar="FILE.md")
    arguments = parser.parse_args()
    made, lines = family("moe"), []
    with tempfile.TemporaryDirectory() as folder:
        budgets, widths = arguments.budget or [1.2, 1.35, 2.0], arguments.bits or [1, 2]
        for line in rows(made, budgets, widths, arguments.tokens, Path(folder)):
            print(line, flush=True)
            lines.append(line)
    columns = f"| plan | bytes | {' | '.join(made.experts)} | mean |"
    table = "\n".join([columns, "|---" * (columns.count("|") - 1) + "|", *lines])
    if arguments.into:
        put(table, arguments.into, BEGIN, END)


if __name__ == "__main__":
    main()
