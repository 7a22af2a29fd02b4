"""Progress on stderr: bars on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]  # (what, done, total)


@contextmanager
def display(progress: Progress | None = None) -> Iterator[Progress]:
    """What to call with (what, done, total): `progress` itself where given, otherwise a display on stderr."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield bars
    else:
        yield _lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeElapsedColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, rich.TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def _lines() -> Progress:
    started: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        first = started.setdefault(what, time.monotonic())
        if done >= total:
            print(f"{what}: {time.monotonic() - first:.0f} s", file=sys.stderr, flush=True)

    return show


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' own bars (a line a checkpoint) off stderr."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
