"""`meswitch router train` and `meswitch router evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from meswitch.cli.arguments import Base, Json, LabelledPrompts
from meswitch.cli.choices import check_choice
from meswitch.router.kinds import KINDS, UNSUPPORTED_KINDS
from meswitch.terminal.progress import show_progress
from meswitch.terminal.tables import format_share, make_table, print_json, shorten, stdout_console, write_text

_LISTED_MISROUTES = 10

router_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Train and evaluate routers.

    A router chooses the expert for a prompt that names none.

    \b
      meswitch router train base/ -o router/ --data prompts.jsonl
      meswitch router evaluate base/ router/ --data heldout.jsonl
    """,
)


@router_app.command("train")
def train(
    base: Base,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The router's folder to write.")],
    data: LabelledPrompts,
    kind: Annotated[
        str,
        typer.Option(
            metavar="|".join([*KINDS, *UNSUPPORTED_KINDS]),
            help=f"How the router decides. This version trains: {', '.join(KINDS)}.",
        ),
    ] = "embedding",
    threshold: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="The probability below which a prompt goes to the base, from 0 to 1."),
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Which prompts are held out to calibrate on; any integer.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a router on labelled prompts; "base" is a label too.

    \b
      meswitch router train base/ -o router/ --data prompts.jsonl
    """
    check_choice("--kind", kind, [*KINDS, *UNSUPPORTED_KINDS])
    with show_progress(first="reading prompts") as progress:
        from meswitch.router import routers

        router = routers.train_router(base, data, out, kind=kind, threshold=threshold, seed=seed, progress=progress)
    if as_json:
        print_json(router.summary())
    else:
        typer.echo(f"{out}: routes between {', '.join(router.experts)}")


@router_app.command("evaluate")
def evaluate(
    base: Base,
    router: Annotated[Path, typer.Argument(metavar="DIR", help="A trained router.")],
    data: LabelledPrompts,
    as_json: Json = False,
) -> None:
    """Measure a router on labelled prompts it has not seen.

    \b
      meswitch router evaluate base/ router/ --data heldout.jsonl
    """
    with show_progress(first="reading prompts") as progress:
        from meswitch.router import routers

        report = routers.evaluate_router(base, router, data, progress=progress)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _print_report(report: dict[str, Any]) -> None:
    table = make_table("expert", "prompts >", "recall >", "precision >", "abstained >")
    for name, row in report["per_expert"].items():
        shares = [format_share(row[key]) for key in ("recall", "precision", "abstained")]
        table.add_row(name, str(row["prompts"]), *shares)
    stdout_console().print(table)
    typer.echo(
        f"accuracy {report['accuracy']:.2%}, abstained {report['abstained']:.2%},"
        f" calibration error {report['expected_calibration_error']:.3f}"
    )
    misrouted = report["misrouted"]
    for row in misrouted[:_LISTED_MISROUTES]:
        write_text(f"  {row['expert']} sent to {row['sent']}: {shorten(row['prompt'])}\n")
    if len(misrouted) > _LISTED_MISROUTES:
        typer.echo(f"  and {len(misrouted) - _LISTED_MISROUTES} more: --json lists them all")
