"""Wrong values of options as wrong usage: exit code 2, with the command's usage on stderr."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer


def check_choice(option: str, value: object, allowed: Iterable[object]) -> None:
    """Raises `typer.BadParameter` for a value that is not among `allowed`."""
    choices = list(allowed)
    if value not in choices:
        expected = ", ".join(map(str, choices))
        raise typer.BadParameter(f"expected one of {expected}, found {value}", param_hint=option)


def named_files(option: str, entries: Iterable[str] | None, names: Collection[str]) -> dict[str, Path]:
    """The files that are given as NAME=FILE. Raises `typer.BadParameter` for another form or an unknown name."""
    files = {}
    for entry in entries or ():
        name, equals, file = entry.partition("=")
        if not equals or not file:
            raise typer.BadParameter(f"expected NAME=FILE, found {entry!r}", param_hint=option)
        check_choice(option, name, names)
        files[name] = Path(file)
    return files


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turns a `ValueError` raised inside, such as that of `CompressOptions`, into `typer.BadParameter`."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
