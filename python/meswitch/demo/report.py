"""What a tour prints at its end."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from meswitch.demo.serving import SERVED_PRESET
from meswitch.terminal.tables import format_number, format_share, format_size, make_table, shorten, stdout_console


def print_report(report: dict[str, Any]) -> None:
    """The report of `tour.run`, for a person."""
    console = stdout_console()
    _print_sizes(report, console)
    _print_scores(report, console)
    _print_routing(report, console)
    _print_serving(report, console)
    console.print("[bold]Where it lies[/]")
    rows = {"base": report["base"], **report["experts"], "deltas": {"path": report["out"]}}
    for name, row in rows.items():
        console.print(f"  {name:<7} {row['path']}", markup=False, highlight=False)


def _evaluated(report: dict[str, Any]) -> list[str]:
    """The experts that there was held-out text for."""
    return [name for name in report["experts"] if name in report["evaluations"][SERVED_PRESET]]


def _print_sizes(report: dict[str, Any], console: Console) -> None:
    names, evaluations = _evaluated(report), report["evaluations"]
    weights = sum(delta["bytes"] / delta["bpw"] for delta in report["deltas"][SERVED_PRESET].values())
    full = sum(expert["bytes"] for expert in report["experts"].values())
    columns = ("preset", "size >", "bits a weight >", "smaller by >", *(f"{name} kept >" for name in names))
    table = make_table(*columns, title=f"{len(report['experts'])} fine-tunes as deltas")
    table.add_row("(full)", format_size(full), f"{full / weights:.2f}", "1.0x", *(format_share(1.0) for _ in names))
    for preset, deltas in report["deltas"].items():
        size = sum(delta["bytes"] for delta in deltas.values())
        bpw = sum(delta["bpw"] for delta in deltas.values()) / len(deltas)
        shares = [format_share(evaluations[preset][name]["recovered_share"]) for name in names]
        table.add_row(preset, format_size(size), f"{bpw:.2f}", f"{full / size:.1f}x", *shares)
    console.print(table)


def _print_scores(report: dict[str, Any], console: Console) -> None:
    names = _evaluated(report)
    for name in names:
        scores = report["evaluations"][SERVED_PRESET][name]
        base, finetune, delta = (format_number(scores[who]["nll"], "{:.3f}") for who in ("base", "finetune", "expert"))
        line = f"base {base}, fine-tune {finetune}, delta {delta} nats a token on held-out text ({SERVED_PRESET})"
        console.print(f"  {name}: {line}", highlight=False)
    if names:
        console.print("  kept: the share of the fine-tune's gain over the base that is left in the delta")
    console.print()


def _print_routing(report: dict[str, Any], console: Console) -> None:
    router = report["router"]
    if router is None:
        return
    console.print("[bold]Routing[/]")
    prompts = sum(row["prompts"] for row in router["per_expert"].values())
    accuracy = format_share(router["accuracy"])
    console.print(f"  {accuracy} of {prompts} unseen prompts went to their expert", highlight=False)
    for name, row in router["per_expert"].items():
        if row["prompts"]:
            console.print(f"  {name}: {format_share(row['recall'])} of {row['prompts']}", highlight=False)
    console.print()


def _print_serving(report: dict[str, Any], console: Console) -> None:
    serving = report["serving"]
    mixed, base = serving["mixed_tokens_per_second"], serving["base_tokens_per_second"]
    title = f"One batch of {serving['requests']} requests, {len(report['experts'])} experts"
    console.print(f"[bold]{title}[/]", highlight=False)
    for answer in serving["answers"]:
        line = f"  {answer['expert']}: {shorten(answer['prompt'], 40, keep_end=True)} → {shorten(answer['text'], 60)}"
        console.print(line, markup=False, highlight=False)
    speeds = f"{mixed:.0f} tokens/s mixed, {base:.0f} tokens/s with the base alone: {format_share(mixed / base)}"
    console.print(f"  {speeds}", highlight=False)
    console.print()
