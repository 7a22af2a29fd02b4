"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meswitch.terminal.tables import json_alone

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="The base model: a folder or a hub id, or a quantized model.")
]
DeltaDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="A delta directory.")]
DeltaOutput = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="DIR", help="The delta directory to write; one that is there is replaced."),
]


AllowQuantizedBase = Annotated[
    bool,
    typer.Option(
        "--allow-quantized-base",
        help="Put deltas on a quantized form of the base that they were made against (default: refused).",
    ),
]


def _print_json_alone(context: typer.Context, wanted: bool) -> bool:
    if wanted:
        context.with_resource(json_alone())
    return wanted


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_print_json_alone,
        help="Print one JSON value on stdout and nothing else (default: text for people).",
    ),
]
LabelledPrompts = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="FILE.jsonl",
        help='Labelled prompts, one {"prompt": …, "expert": …} a line; the expert may be "base".',
    ),
]
