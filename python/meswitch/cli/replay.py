"""`meswitch replay`: what eviction policies and budgets would have done about the requests of a trace."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli.arguments import Json
from meswitch.cli.choices import check_choice, usage_errors
from meswitch.terminal.progress import show_status
from meswitch.terminal.tables import format_share, format_size, make_table, print_json, stdout_console

if TYPE_CHECKING:
    from meswitch._native import Trace

OPTIMAL = "optimal"
_BUDGETS = 8


def replay(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="A trace that Engine(trace=TRACE) or Engine(moe_trace=TRACE) wrote.")
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE",
            help='Memory for units, such as "2GiB"; may be given several times (default: eight budgets, from the'
            " largest unit to all of them).",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="lru|lrfu",
            help="Which unit leaves first. lru: the least recently used. lrfu: the least recently and least"
            " frequently used, in a proportion that the requests decide. May be given several times (default: all).",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png|.svg", help="Also draw hit rates by budget (default: no plot).", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what other budgets and eviction policies would have done.

    Replays the requests of a trace one after the other and counts how many find their unit (an expert, or a matrix of
    a MoE expert) in memory, and how much is read for the others. "optimal" is what a policy that knows the future
    would do (Belady's MIN): with units of one size nothing reads less, with different sizes it is a mark to compare
    with.

    \b
      meswitch replay trace.jsonl
      meswitch replay trace.jsonl --budget 2GiB --budget 4GiB --policy lrfu --plot hits.svg
    """
    from meswitch import _native
    from meswitch.sizes import parse_bytes

    for name in policy or []:
        check_choice("--policy", name, _native.policies())
    with usage_errors():
        budgets = [size for text in budget or [] if (size := parse_bytes(text, "--budget")) is not None]
    if plot is not None:
        from meswitch.cli.plot import FORMATS, require_matplotlib

        check_choice("--plot", plot.suffix, FORMATS)
        require_matplotlib()
    with show_status("replaying"):
        read = _native.Trace(trace)
        replays = _replay(
            read, sorted(set(budgets)) or budget_series(read.largest, read.total), policy or _native.policies()
        )
    report = {name: getattr(read, name) for name in ("requests", "experts", "largest", "total", "budget", "policy")}
    if plot is not None:
        from meswitch.cli.plot import draw_hit_rates

        draw_hit_rates(replays, plot)
    if as_json:
        print_json({**report, "replays": replays})
    else:
        _print_report(report, replays)


def budget_series(largest: int, total: int) -> list[int]:
    """Budgets from the largest unit to all of them, each larger than the one before by the same factor.

    >>> budget_series(1_000, 128_000)
    [1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000]
    >>> budget_series(5, 5), budget_series(0, 0)
    ([5], [1])
    """
    least = max(largest, 1)
    most = max(total, least)
    steps = [(most / least) ** (step / (_BUDGETS - 1)) for step in range(_BUDGETS)]
    return sorted({min(round(least * step), most) for step in steps} | {most})


def _replay(trace: Trace, budgets: list[int], policies: list[str]) -> list[dict[str, Any]]:
    """One replay a budget and policy, and the optimum after those of its budget."""
    replays = []
    for budget in budgets:
        for name in [*dict.fromkeys(policies), OPTIMAL]:
            counts = trace.optimal(budget) if name == OPTIMAL else trace.replay(budget, name)
            hit_rate = counts["hits"] / counts["requests"]
            replays.append({"budget": budget, "policy": name, "hit_rate": hit_rate, **counts})
    return replays


def _print_report(report: dict[str, Any], replays: list[dict[str, Any]]) -> None:
    limit = "without a limit" if report["budget"] is None else f"with {format_size(report['budget'])}"
    typer.echo(
        f"{report['requests']:,} requests for {report['experts']:,} units of {format_size(report['total'])}, the"
        f" largest {format_size(report['largest'])}; served under {report['policy']} {limit}\n"
    )
    table = make_table("budget >", "policy", "hit rate >", "loads >", "evictions >", "read >", "of optimal >")
    best = {row["budget"]: row["bytes_read"] for row in replays if row["policy"] == OPTIMAL}
    for row in replays:
        first = row["policy"] == replays[0]["policy"]
        least = best[row["budget"]]
        table.add_row(
            format_size(row["budget"]) if first else "",
            row["policy"],
            format_share(row["hit_rate"]),
            f"{row['loads']:,}",
            f"{row['evictions']:,}",
            format_size(row["bytes_read"]),
            f"{row['bytes_read'] / least:.2f}x" if least else "-",
        )
    stdout_console().print(table)
    for budget, refused in {row["budget"]: row["refused"] for row in replays if row["refused"]}.items():
        typer.echo(f"{format_size(budget)}: {refused:,} requests ask for a unit that is larger")
