"""The command itself: its commands in the order of the help, and what belongs to none of them."""

from __future__ import annotations

from typing import Annotated

import typer

from meswitch import __version__
from meswitch.cli.compress import compress, import_
from meswitch.cli.deltas import inspect, restore, upgrade, verify
from meswitch.cli.demo import demo
from meswitch.cli.doctor import doctor
from meswitch.cli.evaluate import evaluate
from meswitch.cli.generate import generate
from meswitch.cli.moe import moe_app
from meswitch.cli.quantize import quantize
from meswitch.cli.replay import replay
from meswitch.cli.router import router_app

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Serve many full fine-tunes of one base model as low-bit deltas.

    \b
      meswitch compress base/ math-finetune/ -o experts/math
      meswitch generate base/ --experts experts/ --expert math "What is 17 * 23?"
      meswitch demo         all of it on models trained on the spot
    """,
    epilog="Exit codes: 0 fine, 1 refused or broken, 2 wrong usage, 130 interrupted. With MESWITCH_DEBUG=1 in the"
    " environment an error shows its traceback.",
)
app.command()(compress)
app.command("import")(import_)
app.command()(quantize)
app.command()(inspect)
app.command()(verify)
app.command()(restore)
app.command()(upgrade)
app.command()(evaluate)
app.add_typer(router_app, name="router")
app.add_typer(moe_app, name="moe")
app.command()(generate)
app.command()(replay)
app.command()(demo)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meswitch {__version__}")
        raise typer.Exit()


@app.callback()
def _top_options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options before any command."""
