"""`meswitch moe`: what is for mixtures of experts alone."""

from __future__ import annotations

import typer

from meswitch.cli.share import share

moe_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Mixtures of experts, and fine-tunes of one.

    \b
      meswitch moe share math/ code/ chat/ -o shared/ --budget 60GiB
    """,
)
moe_app.command()(share)


@moe_app.callback()
def _moe() -> None:
    """A group even while it has one command."""
