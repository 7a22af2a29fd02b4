"""Wrong values of options as wrong usage: exit code 2, with the command's usage on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import typer


def check_choice(option: str, value: object, allowed: Iterable[object]) -> None:
    """Raises `typer.BadParameter` for a value that is not among `allowed`."""
    choices = list(allowed)
    if value not in choices:
        expected = ", ".join(map(str, choices))
        raise typer.BadParameter(f"expected one of {expected}, found {value}", param_hint=option)


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a `ValueError` raised inside, such as that of `CompressOptions`, into `typer.BadParameter`."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
