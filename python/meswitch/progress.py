"""How work that takes long says how far it is: one type, for the library, the command line and the demo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """How far a task is.

    `done` and `total` count what the task is made of: weights of a compress, tokens of an evaluation, steps of a
    training. `item` is what comes next, such as a parameter's name. `resumed` of the `done` were finished by an earlier
    run that was interrupted.
    """

    task: str
    done: int
    total: int
    item: str = ""
    resumed: int = 0


ProgressCallback = Callable[[Progress], object]
"""Called on the thread that does the work, so it should be quick. What it raises ends the work."""


def relabel(callback: ProgressCallback | None, task: str) -> ProgressCallback:
    """A callback that hands on what it hears as the progress of `task`."""

    def report(progress: Progress) -> None:
        if callback is not None:
            callback(replace(progress, task=task))

    return report


class ProgressMeter:
    """Counts what a task has done and reports it; silent without a callback.

    >>> meter = ProgressMeter(print, "reading", total=3)
    >>> meter.advance(2)
    Progress(task='reading', done=2, total=3, item='', resumed=0)
    """

    def __init__(self, callback: ProgressCallback | None, task: str, total: int) -> None:
        self._callback, self._task, self._total = callback, task, total
        self.done = 0

    def advance(self, count: int, item: str = "") -> None:
        """`count` more are done."""
        self.update(self.done + count, item)

    def update(self, done: int, item: str = "", resumed: int = 0) -> None:
        """`done` are done in all."""
        self.done = done
        if self._callback is not None:
            self._callback(Progress(self._task, done, self._total, item, resumed))
