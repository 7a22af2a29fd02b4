"""What an interrupted distillation leaves for the next one, in a folder beside `out`.

.NAME.distilling/
    key                 which distillation this is: a hash of everything that decides its outcome
    STAGE.safetensors   the scales as they are stored, by SITE/ROLE
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


class Journal:
    """The folder of one distillation; what another one left there is thrown away."""

    def __init__(self, out: Path, about: dict[str, Any]) -> None:
        """`about`: everything that decides the outcome."""
        self.folder = out.absolute().with_name(f".{out.absolute().name}.distilling")
        self._key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Makes the folder, or finds the one that was left."""
        path = self.folder / "key"
        if not path.is_file() or path.read_text() != self._key:
            self.close()
            self.folder.mkdir(parents=True)
            _write(path, lambda partial: partial.write_text(self._key))

    def load(self, stage: int) -> dict[str, Tensor] | None:
        """The scales that a finished stage left."""
        path = self.folder / f"{stage}.safetensors"
        return load_file(path) if path.is_file() else None

    def save(self, stage: int, tensors: dict[str, Tensor]) -> None:
        """All of the stage, or nothing of it."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _write(self.folder / f"{stage}.safetensors", lambda partial: save_file(whole, partial))

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _write(path: Path, fill: Any) -> None:
    partial = path.with_name(f"{path.name}.incomplete")
    fill(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
