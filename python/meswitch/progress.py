"""Progress of long work: one type for the library, the command line and the demo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """How much of a task is done.

    `done` and `total` count units of the task: weights of a compress, tokens of an evaluation, steps of a training.
    `item` names what is worked on next, such as a parameter. `resumed`: how many of the `done` units an earlier,
    interrupted run had finished.
    """

    task: str
    done: int
    total: int
    item: str = ""
    resumed: int = 0


ProgressCallback = Callable[[Progress], object]
"""Called on the thread that does the work, between two units of it. An exception that it raises ends the work."""


def relabel(callback: ProgressCallback | None, task: str) -> ProgressCallback:
    """A callback that passes every report on to `callback`, with `task` as its task."""

    def report(progress: Progress) -> None:
        if callback is not None:
            callback(replace(progress, task=task))

    return report


class ProgressMeter:
    """Counts the units that are done and reports every change to `callback`, if there is one.

    >>> meter = ProgressMeter(print, "reading", total=3)
    >>> meter.advance(2)
    Progress(task='reading', done=2, total=3, item='', resumed=0)
    """

    def __init__(self, callback: ProgressCallback | None, task: str, total: int) -> None:
        self._callback, self._task, self._total = callback, task, total
        self.done = 0

    def advance(self, count: int, item: str = "") -> None:
        """Counts `count` more units as done."""
        self.update(self.done + count, item)

    def update(self, done: int, item: str = "", resumed: int = 0) -> None:
        """Sets the number of units done."""
        self.done = done
        if self._callback is not None:
            self._callback(Progress(self._task, done, self._total, item, resumed))
