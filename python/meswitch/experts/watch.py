"""A folder of experts that is watched: what appears in it is served, what is replaced or removed there is here too."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from meswitch.errors import MeswitchError
from meswitch.experts.catalogue import expert_folders
from meswitch.experts.failure import Stamp, stamp
from meswitch.experts.pool import ExpertPool

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""The time between two looks at the folder."""


class FolderWatch(threading.Thread):
    """Looks at a folder again and again, on a thread of its own, and tells the pool.

    It compares the names and times of files, since not every file system tells of changes. A directory that cannot be
    opened, because it is half copied for instance, leaves the expert of its name as it was, and is tried again when it
    changes. Experts that the folder never had are left alone.
    """

    def __init__(self, pool: ExpertPool, folder: Path, seconds: float = LOOK_SECONDS) -> None:
        """The folder's experts are in the pool already."""
        super().__init__(name="meswitch-watch", daemon=True)
        self._pool, self._folder, self._seconds = pool, folder, seconds
        self._seen: dict[str, Stamp] = {path.name: stamp(path) for path in expert_folders(folder)}
        self._closed = threading.Event()

    def run(self) -> None:
        while not self._closed.wait(self._seconds):
            try:
                self.look()
            except OSError as error:  # the folder is away for a moment, or for good
                _log.warning("%s cannot be read: %s", self._folder, error)

    def look(self) -> None:
        """Compares the folder with what it was, once."""
        found = {path.name: path for path in expert_folders(self._folder)}
        for name in self._seen.keys() - found.keys():
            del self._seen[name]
            if name in self._pool.catalogue:
                self._pool.remove(name)
        for name, path in found.items():
            now = stamp(path)
            if self._seen.get(name) == now:
                continue
            self._seen[name] = now
            try:
                self._pool.add_found(path)
            except (MeswitchError, OSError, ValueError) as error:
                _log.warning("%s is left as it was: %s", path, error)

    def close(self) -> None:
        """Ends the thread after a look that is under way."""
        self._closed.set()
        if self.is_alive() and threading.current_thread() is not self:
            self.join()
