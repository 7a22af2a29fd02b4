"""`meswitch router train` and `meswitch router evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meswitch.cli.app import Base, Json, Labelled, router_app
from meswitch.cli.choices import check_choice
from meswitch.terminal.progress import show_progress
from meswitch.terminal.tables import format_number, make_table, print_json, shorten, stdout_console, write_text

_SHOWN = 10  # misrouted prompts listed


@router_app.command("train")
def router_train(
    base: Base,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The router's folder to write.")],
    data: Labelled,
    kind: Annotated[
        str, typer.Option(metavar="embedding|prompt", help="This version trains: embedding.")
    ] = "embedding",
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Below this probability a prompt goes to the base.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the folds held out.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a router on labelled prompts; "base" is a label too.

    \b
      meswitch router train base/ -o router/ --data prompts.jsonl
    """
    check_choice("--kind", kind, ("embedding", "prompt"))

    from meswitch.router.routers import train_router

    with show_progress() as progress:
        made = train_router(base, data, out, kind=kind, threshold=threshold, seed=seed, progress=progress)
    if as_json:
        print_json(made.summary())
    else:
        typer.echo(f"{out}: routes between {', '.join(made.experts)}")


@router_app.command("evaluate")
def router_evaluate(
    base: Base,
    router: Annotated[Path, typer.Argument(metavar="DIR", help="A trained router.")],
    data: Labelled,
    as_json: Json = False,
) -> None:
    """Measure a router on labelled prompts it has not seen.

    \b
      meswitch router evaluate base/ router/ --data heldout.jsonl
    """

    from meswitch.router.routers import evaluate_router

    with show_progress() as progress:
        found = evaluate_router(base, router, data, progress=progress)
    if as_json:
        print_json(found)
        return
    table = make_table("expert", "prompts >", "recall >", "precision >", "abstained >")
    for name, row in found["per_expert"].items():
        shares = [format_number(row[key], "{:.1%}") for key in ("recall", "precision", "abstained")]
        table.add_row(name, str(row["prompts"]), *shares)
    stdout_console().print(table)
    typer.echo(
        f"accuracy {found['accuracy']:.2%}, abstained {found['abstained']:.2%},"
        f" calibration error {found['expected_calibration_error']:.3f}"
    )
    for wrong in found["misrouted"][:_SHOWN]:
        write_text(f"  {wrong['expert']} sent to {wrong['sent']}: {shorten(wrong['prompt'])}\n")
    if len(found["misrouted"]) > _SHOWN:
        typer.echo(f"  and {len(found['misrouted']) - _SHOWN} more: --json lists them all")
