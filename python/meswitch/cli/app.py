"""The command itself: its groups, how errors become exit codes, and arguments that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from meswitch import __version__
from meswitch.errors import MeswitchError


class _Group(TyperGroup):
    """Every command's errors become messages and exit codes here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly
        except (MeswitchError, OSError) as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Serve many full fine-tunes of one base model as low-bit deltas.

    \b
      meswitch compress base/ math-finetune/ -o experts/math
      meswitch generate base/ --experts experts/ --expert math "What is 17 * 23?"
      meswitch demo         the whole of it on models trained on the spot
    """,
)
router_app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Train and evaluate routers.

    A router chooses the expert for a prompt that names none.

    \b
      meswitch router train base/ -o router/ --data prompts.jsonl
      meswitch router evaluate base/ router/ --data heldout.jsonl
    """,
)
Base = Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a hub id.")]
DeltaDir = Annotated[Path, typer.Argument(metavar="DIR", help="A delta directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout and nothing else.")]
Labelled = Annotated[Path, typer.Option("--data", metavar="FILE.jsonl", help='Lines {"prompt": …, "expert": …}.')]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meswitch {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of no command."""


def main() -> None:
    """The entry point of the `meswitch` command."""
    app()
