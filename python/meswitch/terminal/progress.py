"""Progress on stderr: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

from meswitch.progress import Progress, ProgressCallback

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def show_progress(callback: ProgressCallback | None = None, *, keep: bool = False) -> Iterator[ProgressCallback]:
    """A callback that shows every task it hears of, or `callback` itself where one is given.

    On a terminal a task is a bar, which stays there at the end if `keep` says so; elsewhere it is a line every few
    seconds. That an interrupted run is continued is said once. transformers' own bars and notes are off meanwhile.
    """
    with quiet_transformers():
        if callback is not None:
            yield callback
        elif sys.stderr.isatty():
            with _bars(keep=keep) as show:
                yield show
        else:
            yield progress_lines()


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

        def show(progress: Progress) -> None:
            if progress.task not in tasks:
                tasks[progress.task] = display.add_task(progress.task, total=progress.total)
                if progress.resumed:
                    display.console.print(_resumed(progress))
            display.update(tasks[progress.task], completed=progress.done, total=progress.total)

        yield show


def progress_lines(every: float = SECONDS_BETWEEN_LINES) -> ProgressCallback:
    """A callback that prints a line when a task ends, and every so many seconds before."""
    started: dict[str, float] = {}
    printed: dict[str, float] = {}

    def show(progress: Progress) -> None:
        now = time.monotonic()
        if progress.task not in started:
            started[progress.task] = printed[progress.task] = now
            if progress.resumed:
                print(_resumed(progress), file=sys.stderr, flush=True)
        ended = progress.done >= progress.total
        if not ended and now - printed[progress.task] < every:
            return
        printed[progress.task] = now
        share, passed = progress.done / max(progress.total, 1), now - started[progress.task]
        line = f"{progress.task}: {share:.0%}"
        if ended:
            line += f", {passed:.0f} s"
        elif share >= 0.01:  # less than a hundredth says nothing of the rest
            line += f", {passed / share - passed:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    return show


def _resumed(progress: Progress) -> str:
    return f"going on from an interrupted run, which did {progress.resumed:,} weights"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars and notes off stderr: the caller shows its own progress."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
