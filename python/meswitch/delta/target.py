"""Where a delta directory may be written."""

from __future__ import annotations

from pathlib import Path

from meswitch.delta.directory import MANIFEST
from meswitch.errors import FormatError


def refuse_overwriting(target: Path) -> None:
    """Raises `FormatError` if there is something at `target` that is not a delta directory, nor an empty folder."""
    if target.exists() and not (target / MANIFEST).is_file() and (target.is_file() or any(target.iterdir())):
        raise FormatError(
            f"expected a new folder or a delta directory to write to, found something else at {target}",
            hint="choose another folder; only a delta directory is replaced",
        )
