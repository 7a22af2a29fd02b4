"""`meswitch demo`: a tour of the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meswitch.cli.arguments import Json
from meswitch.cli.choices import check_choice
from meswitch.terminal.progress import show_imports

OwnBase = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="BASE",
        help="A base of your own: a folder or a hub id (default: a family trained on the spot).",
        show_default=False,
    ),
]
OwnExperts = Annotated[
    list[str] | None,
    typer.Option(
        "--experts",
        metavar="NAME=FOLDER",
        help="A fine-tune of that base; give the option once for each.",
        show_default=False,
    ),
]
FamilyName = Annotated[
    str,
    typer.Option(
        "--family",
        metavar="tiny|moe|smol",
        help="Models to train where none are given. tiny: two minutes. moe: mixtures of experts, eight minutes."
        " smol: SmolLM2-135M and fine-tunes of it, an hour, once; needs meswitch[smol].",
    ),
]
OwnData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE.jsonl",
        help='For your own models: {"prompt", "expert"[, "completion"]} a line; each fifth line of an expert is held'
        " out (default: no evaluation and no routing).",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--out",
        metavar="DIR",
        help="Where deltas and router are kept and found again (default: beside the family, or in $MESWITCH_CACHE).",
        show_default=False,
    ),
]


def demo(
    model: OwnBase = None,
    experts: OwnExperts = None,
    family: FamilyName = "tiny",
    data: OwnData = None,
    out: Output = None,
    as_json: Json = False,
) -> None:
    """Tour the library on small models trained on the spot.

    Training them takes about two minutes, once; or bring your own models.

    \b
      meswitch demo
      meswitch demo --family smol
      meswitch demo --model base/ --experts math=math-finetune/ --experts code=code-finetune/ --data prompts.jsonl
    """
    finetunes = dict(_parse_expert(entry) for entry in experts or [])
    if (model is None) != (not finetunes):
        raise typer.BadParameter("--model and --experts go together", param_hint="--model")
    if model is None and data is not None:
        raise typer.BadParameter("the family brings its own data", param_hint="--data")
    with show_imports():
        from meswitch.demo import tour
        from meswitch.demo.family import FAMILIES

    check_choice("--family", family, FAMILIES)
    tour.run(model, finetunes or None, family=family, data=data, out=out, json=as_json)


def _parse_expert(entry: str) -> tuple[str, str]:
    name, equals, folder = entry.partition("=")
    if not (name and equals and folder):
        raise typer.BadParameter(f"expected NAME=FOLDER, found {entry!r}", param_hint="--experts")
    return name, folder
