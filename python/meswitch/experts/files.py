"""The small files of models (config, tokenizer, chat template), read once and kept once.

    a delta directory  ── delta_files ──┐
                                        ├── SmallFiles ── written_out ── a folder, for as long as transformers reads it
    the base's folder ── base_files ────┘

What a request is answered with must not depend on what lies at a path later: a folder may be renamed, replaced or
deleted while its expert is served. Contents that are equal are one object, so that many experts with the base's
tokenizer keep it once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias
from weakref import WeakValueDictionary

from meswitch import _native
from meswitch.delta.directory import Delta
from meswitch.huggingface.files import SMALL_FILES, matches, small_files


class Content:
    """The bytes of a file, and their checksum as manifests state it."""

    __slots__ = ("__weakref__", "checksum", "data")

    def __init__(self, checksum: str, data: bytes) -> None:
        self.checksum, self.data = checksum, data


SmallFiles: TypeAlias = Mapping[str, Content]
"""The small files of one model, by name."""


class ContentStore:
    """Contents by checksum, each for as long as somebody holds it. May be used from any thread."""

    def __init__(self) -> None:
        self._contents: WeakValueDictionary[str, Content] = WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, checksum: str, read: Callable[[], bytes]) -> Content:
        """The content with this checksum; `read` is called where it is not here yet."""
        with self._lock:
            content = self._contents.get(checksum)
        if content is None:
            content = Content(checksum, read())
            with self._lock:
                content = self._contents.setdefault(checksum, content)
        return content


def delta_files(delta: Delta, store: ContentStore) -> SmallFiles:
    """The small files of an opened delta. Raises `ChecksumError` or `OSError` for one that is not what was written."""
    checksums = delta.files
    return {
        name: store.get(checksums[name], lambda name=name: delta.read_file(name))  # type: ignore[misc]
        for name in matches(checksums, SMALL_FILES)
    }


def base_files(folder: Path, store: ContentStore) -> SmallFiles:
    """The small files of a checkpoint. Raises `OSError` for one that cannot be read."""
    files = {}
    for name, path in small_files(folder).items():
        data = path.read_bytes()
        files[name] = store.get(_native.checksum(data), lambda data=data: data)  # type: ignore[misc]
    return files


@contextmanager
def written_out(files: SmallFiles) -> Iterator[Path]:
    """A temporary folder with these files: transformers reads nothing but folders."""
    with TemporaryDirectory(prefix="meswitch-") as name:
        folder = Path(name)
        for file, content in files.items():
            (folder / file).write_bytes(content.data)
        yield folder
