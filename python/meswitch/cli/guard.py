"""The process of a command: its streams, its signals, and what it ends with, whatever is raised in it.

    main ── signals, streams ── run ── the command ── an exception ── one line, a hint ── exit code

Nothing that takes time is imported before the signals are taken care of: an interrupt ends quietly from the start.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # importing it from `typing` would take longer than all that this module needs
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from threading import ExceptHookArgs
    from types import FrameType
    from typing import Any, NoReturn

REFUSED = 1
_SIGNALS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminated: the terminal was closed"}
_WORD_OF_CODE = {128 + getattr(signal, name): word for name, word in _SIGNALS.items() if hasattr(signal, name)}
_received: list[int] = []


def main() -> NoReturn:
    """The entry point of the `meswitch` command."""
    _take_signals(_unwind)
    _prepare_streams()
    _prepare_hooks()
    code = run(sys.argv[1:])
    _take_signals(_end_at_once)
    _give_streams_up()
    sys.exit(code)


def run(args: Sequence[str]) -> int:
    """Runs the command with these arguments and returns its exit code; never raises. Errors are on stderr."""
    from meswitch.cli.message import say, say_error

    try:
        code = _run(args)
    except BrokenPipeError:
        return REFUSED  # whoever reads has enough
    except BaseException as error:  # a panic of the native module is no Exception
        if _received:
            code = 128 + _received[0]  # an interrupted import may turn into any other error
        elif isinstance(error, KeyboardInterrupt):
            code = 128 + signal.SIGINT
        else:
            say_error(error)
            return REFUSED
    if code in _WORD_OF_CODE:
        say(_WORD_OF_CODE[code])
    return code


def _run(args: Sequence[str]) -> int:
    from typer.main import get_command

    from meswitch.cli.app import app

    try:
        get_command(app).main(args=list(args), prog_name="meswitch")
    except SystemExit as end:  # typer's way, also of wrong usage
        sys.stdout.flush()  # a disk that is full shows now
        return end.code if isinstance(end.code, int) else 0 if end.code is None else REFUSED
    return 0


def _take_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for name in _SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, handler)


def _unwind(number: int, _: FrameType | None) -> None:
    """Ends the command by an exception, so that nothing half written stays; a second signal ends it at once."""
    _take_signals(_end_at_once)
    _received.append(number)
    raise SystemExit(128 + number)  # also for an interrupt: Python may end itself by SIGINT after a KeyboardInterrupt


def _end_at_once(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)


def _prepare_streams() -> None:
    """Every stream is there, closed ones as an empty one, and none fails for a letter that it cannot encode."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    stdout: Any = sys.stdout
    stdout.reconfigure(errors="replace")


def _give_streams_up() -> None:
    """What is left in a stream that takes nothing any more is dropped, or Python complains of it at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _prepare_hooks() -> None:
    """What Python would print by itself becomes a line too: errors of threads, and warnings."""
    import threading
    import warnings

    threading.excepthook = _say_thread_error
    warnings.formatwarning = _format_warning
    sys.unraisablehook = lambda _: None  # it would print a traceback of what nobody can catch


def _say_thread_error(args: ExceptHookArgs) -> None:
    from meswitch.cli.message import say_error

    if args.exc_value is not None:
        say_error(args.exc_value)


def _format_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    from meswitch.cli.message import one_line
    from meswitch.errors import DataWarning

    name = "warning" if issubclass(category, DataWarning) else category.__name__
    return one_line(f"{name}: {message}") + "\n"
