"""Options that take one of a few values."""

from __future__ import annotations

from collections.abc import Iterable

import typer


def check_choice(option: str, found: object, allowed: Iterable[object]) -> None:
    """Raises `typer.BadParameter` for a value that is not among `allowed`."""
    choices = list(allowed)
    if found not in choices:
        expected = ", ".join(map(str, choices))
        raise typer.BadParameter(f"expected one of {expected}, found {found}", param_hint=option)
