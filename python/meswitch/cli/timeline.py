"""`meswitch moe timeline`: which MoE experts were in memory when, as a trace of them says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli.arguments import Json
from meswitch.cli.choices import check_choice
from meswitch.terminal.progress import show_status
from meswitch.terminal.tables import format_share, make_table, print_json, stdout_console

if TYPE_CHECKING:
    from meswitch.moe.timeline import MoeTimeline


def timeline(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A trace that Engine(moe_trace=TRACE) wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE.png|.svg",
            help="Draw a row for each MoE expert over the time (default: no picture).",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which MoE experts were in memory when, and how often a layer found them there.

    Hits are matrices that a step needed and found in memory; "in memory" is the share of a layer's bytes, as a mean
    over the time.

    \b
      meswitch generate model/ --moe-budget 8GiB --moe-trace trace.jsonl "What is 17 * 23?"
      meswitch moe timeline trace.jsonl -o residency.png
    """
    if out is not None:
        from meswitch.cli.plot import FORMATS, require_matplotlib

        check_choice("--out", out.suffix, FORMATS)
        require_matplotlib()
    with show_status("reading the trace"):
        from meswitch.moe.timeline import read_timeline

        found = read_timeline(trace)
    if out is not None:
        from meswitch.cli.plot import draw_residency

        draw_residency(found, out)
    if as_json:
        print_json(found.to_json())
    else:
        _print_timeline(found)


def _print_timeline(found: MoeTimeline) -> None:
    typer.echo(
        f"{sum(len(layer.resident) for layer in found.layers):,} MoE experts in {len(found.layers):,} layers over"
        f" {found.seconds:,.1f} s: {format_share(found.hit_rate)} of what was needed was in memory, and"
        f" {format_share(found.resident_share)} of the bytes\n"
    )
    table = make_table("layer", "needed >", "hit rate >", "in memory >")
    for layer in found.layers:
        table.add_row(
            layer.name, f"{layer.requests:,}", format_share(layer.hit_rate), format_share(layer.resident_share)
        )
    stdout_console().print(table)
