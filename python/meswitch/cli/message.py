"""An exception as a person reads it at the command line: one line, and a hint below it."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress

from meswitch.errors import MeswitchError

DEBUG = "MESWITCH_DEBUG"
"""The environment variable that, set to anything but 0, has the traceback printed too."""

_LONGEST_LINE = 2000
_NOT_UTF_8 = "unpacking string as utf-8"  # as torch words it of a path
_OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory")  # as torch words it


def say_error(error: BaseException) -> None:
    """The error on stderr; before it the traceback, where the environment asks for it."""
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    message, hint = describe_error(error)
    say(message if hint is None else f"{message}\nhint: {hint}")


def say(text: str) -> None:
    """To stderr; a stderr that cannot be written to is no reason to fail."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def describe_error(error: BaseException) -> tuple[str, str | None]:
    """The error's line, and its hint.

    >>> describe_error(MeswitchError("expected 2,\\nfound 3", hint="take one away"))
    ('MeswitchError: expected 2, found 3', 'take one away')
    >>> describe_error(KeyError("weight"))[0]
    "internal error: KeyError: 'weight'"
    """
    name = type(error).__name__
    if isinstance(error, MeswitchError):
        return one_line(f"{name}: {error.message}"), None if error.hint is None else one_line(error.hint)
    line = one_line(f"{name}: {error}" if str(error) else name)
    if isinstance(error, OSError):
        return line, None
    if _is_lack_of_memory(error):
        return f"out of memory: {line}", "close other programs, or use a smaller model or a machine with more memory"
    if isinstance(error, UnicodeError) or _NOT_UTF_8 in line:
        return line, f"a name or a file holds text that is not UTF-8; {DEBUG}=1 shows where it was read"
    if isinstance(error, ImportError):
        return line, "`meswitch doctor` says what is installed here and what is missing"
    return f"internal error: {line}", (
        f"this is a fault of meswitch's own; please report what {DEBUG}=1 prints, with `meswitch doctor`"
    )


def _is_lack_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )


def one_line(text: str) -> str:
    """The text on one line, without control characters, which may come from a hostile file; a long one's middle is cut.

    >>> one_line("one\\n  two \\x1b[31m")
    'one two \\\\x1b[31m'
    """
    joined = " ".join(line.strip() for line in text.splitlines() if line.strip())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"
