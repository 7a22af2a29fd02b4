"""The finished stages of a distillation on disk, so that an interrupted one goes on from there.

.NAME.distilling/       beside the delta directory NAME that is written
    key                 which distillation this is: a hash of everything that decides its outcome
    STAGE.safetensors   the scales as they are stored, by SITE/ROLE
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


class Journal:
    """The journal of the distillation that writes to `out`.

    `inputs`: everything that decides the outcome, as JSON. Files are written under another name and renamed, so a
    journal holds whole stages only. Who uses a journal holds the lock on `out` (`target.lock_target`).
    """

    def __init__(self, out: Path, inputs: dict[str, Any]) -> None:
        self.folder = out.absolute().with_name(f".{out.absolute().name}.distilling")
        self._key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def open(self) -> None:
        """Keeps the stages that an equal distillation left; deletes those of any other."""
        path = self.folder / "key"
        if not path.is_file() or path.read_text() != self._key:
            self.delete()
            self.folder.mkdir(parents=True)
            _write_atomically(path, lambda partial: partial.write_text(self._key))

    def load(self, stage: int) -> dict[str, Tensor] | None:
        """The scales of a finished stage; `None` if it is not finished."""
        path = self.folder / f"{stage}.safetensors"
        return load_file(path) if path.is_file() else None

    def save(self, stage: int, tensors: dict[str, Tensor]) -> None:
        """Writes the scales of a finished stage."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _write_atomically(self.folder / f"{stage}.safetensors", lambda partial: save_file(contiguous, partial))

    def delete(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f"{path.name}.incomplete")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
