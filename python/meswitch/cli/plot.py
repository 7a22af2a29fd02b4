"""Plots of the command, drawn by matplotlib where that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from meswitch.errors import MissingPackageError

_MOST_LABELS = 8


def require_matplotlib() -> None:
    """Raises `MissingPackageError` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError(
            "a plot needs matplotlib, which is not installed", hint="pip install 'meswitch[plot]'"
        )


def draw_hit_rates(replays: list[dict[str, Any]], path: Path) -> None:
    """Hit rates by budget, a line a policy, in the format that the path's end names.

    `replays` are those of `meswitch replay --json`. The same replays make the same file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from meswitch.terminal.tables import format_size

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["policy"] for row in replays):
        rows = [row for row in replays if row["policy"] == name]
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if name == "optimal" else {"marker": "o"}
        axes.plot([row["budget"] for row in rows], [100 * row["hit_rate"] for row in rows], label=name, **style)
    axes.set(xscale="log", xlabel="memory for experts", ylabel="requests whose expert was in memory, %", ylim=(0, 101))
    budgets = sorted({row["budget"] for row in replays})
    labelled = budgets[:: -(-len(budgets) // _MOST_LABELS)]
    axes.set_xticks(labelled, [format_size(budget) for budget in labelled], rotation=30, ha="right")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    with matplotlib.rc_context({"svg.hashsalt": "meswitch", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
