"""Where a folder may be written, and a new one there that appears complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TypeAlias

from meswitch import _native


def resolve_target(path: str | Path, replaces: str | None) -> Path:
    """`path`, or where a link there leads, if a folder may be written there: nothing is changed yet.

    Only nothing, an empty folder, or one with a file called `replaces` may be there. Raises `OutputError`.

    >>> resolve_target("experts/new", replaces="meswitch.json")
    PosixPath('experts/new')
    """
    return Path(_native.resolve_target(path, replaces))


TargetLock: TypeAlias = _native.Lock


def lock_target(path: str | Path, replaces: str | None) -> AbstractContextManager[TargetLock]:
    """The right to write at `path`, which one process at a time has; its `path` is where a link there leads.

    For work that takes longer than its folder is written, and for what is kept beside it meanwhile. Folders above
    `path` are created. Raises `OutputError` as `resolve_target` does, and where another process writes there.

    >>> with lock_target("experts/new", replaces="meswitch.json") as lock:
    ...     lock.path
    PosixPath('experts/new')
    """
    return closing(_native.Lock(path, replaces))


@contextmanager
def new_folder(path: Path, replaces: str | None) -> Iterator[Path]:
    """A folder to write to, which takes the place of `path` when the block ends; an error leaves `path` as it was.

    Raises `OutputError` as `resolve_target` does, and where another process writes there.

    >>> with new_folder(Path("notes"), replaces="notes.txt") as folder:
    ...     _ = (folder / "notes.txt").write_text("one")
    >>> Path("notes/notes.txt").read_text()
    'one'
    """
    folder = _native.Folder(path, replaces)
    try:
        yield Path(folder.path)
        folder.commit()
    finally:
        folder.close()
