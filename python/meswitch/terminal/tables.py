"""Tables, numbers and text as a person reads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

_json_stream: TextIO | None = None


@contextmanager
def json_alone() -> Iterator[None]:
    """While it lasts, stdout gets what `print_json` prints; whatever else is printed there goes to stderr."""
    global _json_stream
    _json_stream = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream = None


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False), file=_json_stream or sys.stdout, flush=True)


def write_text(text: str) -> None:
    """To stdout at once, with characters that its encoding lacks replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def stdout_console() -> Console:
    """A console on stdout, 200 characters wide where that is no terminal, so that names are not cut."""
    return Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True)


def make_table(*columns: str, title: str | None = None) -> Table:
    """A plain table; a column whose name ends with ` >` is right-aligned."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        right = column.endswith(" >")
        table.add_column(column.removesuffix(" >"), justify="right" if right else "left", no_wrap=True)
    return table


def format_number(value: float | None, form: str) -> str:
    """A number, `-` for `None`.

    >>> format_number(0.5, "{:.1%}"), format_number(None, "{:.1%}")
    ('50.0%', '-')
    """
    return "-" if value is None else form.format(value)


def format_share(share: float | None) -> str:
    """A fraction as a percentage with one decimal, `-` for `None`.

    >>> format_share(0.985), format_share(None)
    ('98.5%', '-')
    """
    return format_number(share, "{:.1%}")


def format_size(count: float) -> str:
    """Bytes in units of 1000.

    >>> format_size(999), format_size(1_500_000), format_size(1.5e12)
    ('999 bytes', '1.5 MB', '1.50 TB')
    """
    for unit, decimals in (("bytes", 0), ("kB", 1), ("MB", 1), ("GB", 2)):
        if count < 1000:
            return f"{count:.{decimals}f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def shorten(text: str, width: int = 80, *, keep_end: bool = False) -> str:
    """Text on one line of at most `width` characters.

    >>> shorten("one two three", 8), shorten("one two three", 8, keep_end=True)
    ('one two…', '…o three')
    """
    line = " ".join(text.split())
    if len(line) <= width:
        return line
    return "…" + line[1 - width :] if keep_end else line[: width - 1] + "…"
