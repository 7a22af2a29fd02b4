"""What several fine-tunes of one mixture of experts keep in little more memory than one of them takes.

    python benches/moe_sharing.py [--plan deltas] [--budget 1.15 --budget 1.35] [--tokens 8192] [--into FILE.md]

The MoE family's three fine-tunes, by the plans of `meswitch moe share`: *bytes* of base and deltas in units of one
model at 16 bits; *kept*: the share of the gain from base to fine-tune on held-out text of each one's own domain. Deltas
are calibrated on other text of that domain. `average` is the mean of the fine-tunes, which answers for all of them.
`--into` puts the table between the lines BEGIN and END of a text.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from quality import put

from meswitch.compression.calibration import calibrate
from meswitch.compression.evaluation import evaluate
from meswitch.compression.job import compress
from meswitch.compression.sensitivity import measure_sensitivity
from meswitch.compression.sharing.family import ModelFamily
from meswitch.compression.sharing.job import PLANS, share
from meswitch.demo.family import Family, family
from meswitch.errors import BudgetError

BEGIN, END = "<!-- benches/moe_sharing.py: begin -->", "<!-- benches/moe_sharing.py: end -->"
AVERAGE = "average"
BUDGETS = [0.6, 0.7, 0.9, 1.0, 1.15, 1.25, 1.35, 1.45]


def kept(made: Family, base: Path, experts: dict[str, Path], tokens: int) -> dict[str, float]:
    """The share of its gain that each fine-tune keeps."""
    found = {}
    for name, delta in experts.items():
        scores = evaluate(base, delta, made.experts[name], made.heldout[name], baseline=made.base, max_tokens=tokens)
        assert scores.recovered_share is not None
        found[name] = 100 * scores.recovered_share
    return found


def rows(made: Family, plans: list[str], budgets: list[float], tokens: int, folder: Path) -> Iterator[str]:
    one = sum(file.stat().st_size for file in made.base.glob("*.safetensors"))
    calibrations = {name: calibrate(path, made.calibration[name]) for name, path in made.experts.items()}
    sensitivities = {
        name: measure_sensitivity(path, made.calibration[name], calibrations[name])
        for name, path in made.experts.items()
    }
    for plan in plans:
        if plan == AVERAGE:
            yield row("average", 16, 1.0, kept(made, *average(made, folder / plan), tokens))
            continue
        for budget in budgets:
            try:
                report = share(
                    made.experts,
                    folder / f"{plan}-{budget}",
                    int(budget * one),
                    plan=plan,  # type: ignore[arg-type]
                    calibrations=calibrations,
                    sensitivities=sensitivities,
                )
            except BudgetError as error:
                print(f"{plan} at {budget}: {error}", flush=True)
                continue
            shares = kept(made, report.base, report.experts, tokens)
            yield row(f"`{plan}`", report.base_bits or 16, report.bytes / one, shares)


def row(plan: str, bits: int, size: float, shares: dict[str, float]) -> str:
    cells = [*(f"{share:.1f}" for share in shares.values()), f"{mean(shares.values()):.1f}"]
    return f"| {plan} | {bits} | {size:.2f} | {' | '.join(cells)} |"


def average(made: Family, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The mean of the models as a base, and a delta of nothing for each."""
    models, base = ModelFamily.open(made.experts, {}), folder / "base"
    base.mkdir(parents=True)
    models.put_together(base, models.mean, None)
    compress(base, base, folder / "delta")
    return base, dict.fromkeys(made.experts, folder / "delta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget", type=float, action="append", help="in units of one model; may be given more than once"
    )
    parser.add_argument("--plan", action="append", choices=[*PLANS, AVERAGE], help="may be given more than once")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--into", type=Path, metavar="FILE.md")
    arguments = parser.parse_args()
    made, lines = family("moe"), []
    with tempfile.TemporaryDirectory() as folder:
        plans, budgets = arguments.plan or [*PLANS, AVERAGE], arguments.budget or BUDGETS
        for line in rows(made, plans, budgets, arguments.tokens, Path(folder)):
            print(line, flush=True)
            lines.append(line)
    columns = f"| plan | base bits | bytes | {' | '.join(made.experts)} | mean |"
    table = "\n".join([columns, "|---" * (columns.count("|") - 1) + "|", *lines])
    if arguments.into:
        put(table, arguments.into, BEGIN, END)


if __name__ == "__main__":
    main()
