"""Why an expert cannot be served, and when it is worth another try."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TypeAlias

from meswitch.delta.directory import MANIFEST, TENSORS
from meswitch.errors import fresh

RETRY_SECONDS = 5.0
"""A broken expert whose files stay the same is not tried again before: a disk may have been away for a moment."""

Stamp: TypeAlias = tuple[tuple[int, ...] | None, ...]


def stamp(path: Path) -> Stamp:
    """What changes when a delta directory is written to, replaced or removed."""
    return tuple(map(_stamp, (path, path / MANIFEST, path / TENSORS)))


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Failure:
    """What went wrong with an expert, and how its files were before.

    `files`: their stamp from before they were opened, so that whatever was written since counts as a change.
    `trying` is held by who opens the expert again; others wait for what comes of that.
    """

    def __init__(self, error: BaseException, path: Path | None, files: Stamp | None) -> None:
        self._path = path
        self.trying = threading.Lock()
        self.note(error, files)

    def note(self, error: BaseException, files: Stamp | None) -> None:
        """Something went wrong again."""
        self.error = fresh(error)
        self._files = files
        self._again = time.monotonic() + RETRY_SECONDS

    @property
    def may_be_over(self) -> bool:
        """Whether the files have changed since, or enough time has passed."""
        if self._path is None:
            return False
        return time.monotonic() >= self._again or stamp(self._path) != self._files

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"
