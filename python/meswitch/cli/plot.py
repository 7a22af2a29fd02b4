"""Plots of the command, drawn by matplotlib where that is installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from meswitch.moe.timeline import MoeTimeline

FORMATS = (".png", ".svg")
_MOST_LABELS = 8
_MOST_LAYER_LABELS = 32


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
    from matplotlib.figure import Figure

    from meswitch.terminal.tables import format_size

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(row["policy"] for row in replays):
        rows = [row for row in replays if row["policy"] == name]
        style: dict[str, Any] = {"color": "black", "linestyle": "--"} if name == "optimal" else {"marker": "o"}
        axes.plot([row["budget"] for row in rows], [100 * row["hit_rate"] for row in rows], label=name, **style)
    axes.set(xscale="log", xlabel="budget", ylabel="requests that found their unit in memory, %", ylim=(0, 101))
    budgets = sorted({row["budget"] for row in replays})
    labelled = budgets[:: -(-len(budgets) // _MOST_LABELS)]
    axes.set_xticks(labelled, [format_size(budget) for budget in labelled], rotation=30, ha="right")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_residency(timeline: MoeTimeline, path: Path) -> None:
    """A row for each MoE expert, layer by layer: dark while it was in memory; beside them the hit rate of each layer.

    The size does not depend on the trace. The same timeline makes the same file.
    """
    import numpy as np
    from matplotlib.figure import Figure

    layers = timeline.layers
    rows = len(layers[0].resident)
    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    axes, rates = figure.subplots(1, 2, sharey=True, width_ratios=[4, 1])
    axes.imshow(
        np.concatenate([layer.resident for layer in layers]),
        aspect="auto",
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(0, timeline.seconds or 1, rows * len(layers), 0),
    )
    for layer in range(1, len(layers)):
        axes.axhline(rows * layer, color="black", linewidth=0.3)
    centres = [rows * (layer + 0.5) for layer in range(len(layers))]
    labelled = slice(None, None, -(-len(layers) // _MOST_LAYER_LABELS))
    axes.set_yticks(centres[labelled], [_short_name(layer.name) for layer in layers][labelled])
    axes.set(xlabel="seconds", ylabel=f"layer, with a row for each of {rows} MoE experts", title="in memory")
    rates.barh(centres, [100 * (layer.hit_rate or 0) for layer in layers], height=0.8 * rows)
    rates.set(xlim=(0, 100), xlabel="hit rate, %")
    rates.grid(axis="x", alpha=0.3)
    _save(figure, path)


def _short_name(module: str) -> str:
    """The number of a layer, where its name has one.

    >>> _short_name("model.layers.3.mlp.experts"), _short_name("experts")
    ('3', 'experts')
    """
    number = re.search(r"\d+", module)
    return number[0] if number else module


def _save(figure: Figure, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "meswitch", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
