"""`meswitch demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meswitch.cli.app import Json, app
from meswitch.cli.choices import check_choice


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(metavar="BASE", help="A base of your own.")] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="A fine-tune of it; give one option for each."),
    ] = None,
    family: Annotated[
        str,
        typer.Option(
            help="Models to train on the spot where none are given: tiny (two minutes), or smol, SmolLM2-135M and "
            "fine-tunes of it (an hour, once; needs meswitch[smol])."
        ),
    ] = "tiny",
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help='For your own models: {"prompt", "expert"[, "completion"]} a line.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Where deltas and router stay.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tour the library on small models trained on the spot.

    Training them takes about two minutes, once; or bring your own models.

    \b
      meswitch demo
      meswitch demo --family smol
      meswitch demo --model base/ --experts math=math-finetune/ --experts code=code-finetune/ --data prompts.jsonl
    """
    named = dict(_named(entry) for entry in experts or [])
    if (model is None) != (not named):
        raise typer.BadParameter("--model and --experts go together", param_hint="--model")
    if model is None and data is not None:
        raise typer.BadParameter("the family brings its own data", param_hint="--data")
    from meswitch.demo.family import FAMILIES
    from meswitch.demo.tour import run

    check_choice("--family", family, FAMILIES)
    run(model, named or None, family=family, data=data, out=out, json=as_json)


def _named(entry: str) -> tuple[str, str]:
    name, found, folder = entry.partition("=")
    if not (name and found and folder):
        raise typer.BadParameter(f"expected NAME=FOLDER, found {entry!r}", param_hint="--experts")
    return name, folder
