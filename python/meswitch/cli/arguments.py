"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a hub id.")]
DeltaDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="A delta directory.")]
DeltaOutput = Annotated[
    Path,
    typer.Option("-o", "--out", metavar="DIR", help="The delta directory to write; one that is there is replaced."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON value on stdout and nothing else (default: text for people).")
]
LabelledPrompts = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="FILE.jsonl",
        help='Labelled prompts, one {"prompt": …, "expert": …} a line; the expert may be "base".',
    ),
]
