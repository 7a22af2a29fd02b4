"""A router's folder: its manifest `router.json` and the files beside it, read with checks and written as one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meswitch.errors import RouterError
from meswitch.huggingface.config import parse_json
from meswitch.target import new_folder

MANIFEST = "router.json"
FORMAT_VERSION = 1


def read_manifest(path: Path) -> dict[str, Any]:
    """`router.json` of a router's folder; raises `RouterError` where it is missing, malformed or of a later version."""
    file = path / MANIFEST
    try:
        manifest = parse_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RouterError(f"expected a router, found no router.json: {path}", hint="meswitch router train") from error
    except ValueError as error:
        raise RouterError(f"expected JSON, found {error}: {file}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise RouterError(f"expected format version {FORMAT_VERSION}, found {version!r}: {file}")
    assert isinstance(manifest, dict)
    return manifest


def write_folder(path: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Write the manifest, with the format version added, and `files` by name into the folder `path`.

    A router that is there is replaced. The folder appears complete or not at all. Raises `OutputError` where `path` is
    something other than a router, `OSError` where it cannot be written.
    """
    text = json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=2) + "\n"
    with new_folder(path, replaces=MANIFEST) as folder:
        for name, content in {**files, MANIFEST: text.encode()}.items():
            (folder / name).write_bytes(content)
