"""Progress on stderr: bars on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

from meswitch.progress import Progress, ProgressCallback

SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_REPEATS = 1.0
_LEAST_SHARE = 0.01  # done, for an estimate of the time left to mean anything


@contextmanager
def show_progress(
    callback: ProgressCallback | None = None, *, first: str | None = None, keep: bool = False
) -> Iterator[ProgressCallback]:
    """A callback that shows every task that it gets reports of, or `callback` itself where one is given.

    On a terminal a task is a bar, which stays at the end if `keep` says so. Elsewhere it is a line when the task ends
    and at least every few seconds before, also while the work reports nothing. `first` is a task that is shown at once,
    before its first report: loading a model takes a while. transformers' own bars and notes are off meanwhile.
    """
    if callback is not None:
        with quiet_transformers():
            yield callback
        return
    with _bars(keep=keep) if sys.stderr.isatty() else _repeated(progress_lines()) as show:
        if first is not None:
            show(Progress(first, 0, 1))
        with quiet_transformers():
            yield show


@contextmanager
def show_imports() -> Iterator[None]:
    """Shows that torch and transformers are being imported, which takes seconds."""
    with show_progress(first="loading libraries"):
        yield


@contextmanager
def show_status(what: str) -> Iterator[None]:
    """A spinner on a terminal while something of unknown length runs."""
    if sys.stderr.isatty():
        with Console(stderr=True).status(what):
            yield
    else:
        yield


@contextmanager
def _bars(*, keep: bool) -> Iterator[ProgressCallback]:
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=not keep) as display:
        tasks: dict[str, bars.TaskID] = {}
        resumed: set[str] = set()

        def show(progress: Progress) -> None:
            if progress.task not in tasks:
                tasks[progress.task] = display.add_task(progress.task, total=progress.total)
            if progress.resumed and progress.task not in resumed:
                resumed.add(progress.task)
                display.console.print(_resumed_text(progress))
            display.update(tasks[progress.task], completed=progress.done, total=progress.total)

        yield show


class _TaskLines:
    """The lines of one task; `every` seconds between two of them."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._started = self._printed = time.monotonic()
        self._ended = self._resumed = False

    def next_lines(self, progress: Progress) -> Iterator[str]:
        """What is to be printed of this report."""
        if progress.resumed and not self._resumed:
            self._resumed = True
            yield _resumed_text(progress)
        now, ended = time.monotonic(), progress.done >= progress.total
        first_end = ended and not self._ended
        if first_end or now - self._printed >= self._every:
            self._printed, self._ended = now, ended
            yield self._line(progress, now - self._started, finishing=ended and not first_end)

    @staticmethod
    def _line(progress: Progress, seconds: float, *, finishing: bool) -> str:
        share = progress.done / max(progress.total, 1)
        if progress.done >= progress.total:
            rest = f", {seconds:.0f} s" + (", finishing" if finishing else "")
        elif share >= _LEAST_SHARE:
            rest = f", {seconds / share - seconds:.0f} s left"
        else:
            rest = f", {seconds:.0f} s so far" if seconds >= 1 else ""
        return f"{progress.task}: {share:.0%}{rest}"


def progress_lines(every: float = SECONDS_BETWEEN_LINES) -> ProgressCallback:
    """A callback that prints a line on stderr when a task ends, and every so many seconds before and after.

    That an interrupted run is continued is printed once for each task.
    """
    tasks: dict[str, _TaskLines] = {}

    def show(progress: Progress) -> None:
        if progress.task not in tasks:
            tasks[progress.task] = _TaskLines(every)
        for line in tasks[progress.task].next_lines(progress):
            print(line, file=sys.stderr, flush=True)

    return show


@contextmanager
def _repeated(show: ProgressCallback) -> Iterator[ProgressCallback]:
    """`show`, which a thread calls with the last report again every second while the work reports nothing."""
    lock, stopped = threading.Lock(), threading.Event()
    latest: Progress | None = None

    def report(progress: Progress) -> None:
        nonlocal latest
        with lock:
            show(progress)
            latest = progress

    def repeat() -> None:
        while not stopped.wait(_SECONDS_BETWEEN_REPEATS):
            with lock:
                if latest is not None:
                    show(latest)

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield report
    finally:
        stopped.set()
        thread.join()


def _resumed_text(progress: Progress) -> str:
    return f"going on from an interrupted run, which did {progress.resumed:,} weights"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars and notes off stderr: the caller shows its own progress."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
