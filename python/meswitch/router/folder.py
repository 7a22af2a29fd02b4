"""A router's folder: its manifest `router.json` and the files beside it, read with checks and written as one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meswitch.errors import RouterError

MANIFEST = "router.json"
FORMAT_VERSION = 1


def read_manifest(path: Path) -> dict[str, Any]:
    """`router.json` of a router's folder; raises `RouterError` where it is missing, malformed or of a later version."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RouterError(f"expected a router, found no router.json: {path}", hint="meswitch router train") from error
    except (ValueError, RecursionError) as error:
        raise RouterError(f"expected JSON, found {error}: {file}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise RouterError(f"expected format version {FORMAT_VERSION}, found {version!r}: {file}")
    assert isinstance(manifest, dict)
    return manifest


def write_folder(path: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write the manifest, with the format version added, and `files` by name into the folder `path`.

    A router that is there is replaced. The folder appears complete or not at all. Raises `RouterError` where `path` is
    something other than a router, `OSError` where it cannot be written.
    """
    _refuse_overwriting(path)
    text = json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new = staging / "new"
        new.mkdir()
        for name, content in {**files, MANIFEST: text.encode()}.items():
            _write_to_disk(new / name, content)
        if path.exists():
            path.rename(staging / "old")
        new.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_overwriting(path: Path) -> None:
    if not path.exists() or (path.is_dir() and (not any(path.iterdir()) or (path / MANIFEST).exists())):
        return
    raise RouterError(f"expected a new folder or a router to replace, found something else: {path}")


def _write_to_disk(file: Path, content: bytes) -> None:
    """Written and flushed to the disk itself, so that a rename after it never shows an empty file."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
