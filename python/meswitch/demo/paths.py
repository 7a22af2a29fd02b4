"""Where a family of models lies on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch.demo.corpus import DOMAINS


@dataclass(frozen=True)
class Family:
    """Where a family lies."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def experts(self) -> dict[str, Path]:
        """The full fine-tunes, by name."""
        return {name: self.root / "finetunes" / name for name in DOMAINS}

    @property
    def heldout(self) -> dict[str, Path]:
        """Text of each domain that no model of the family saw."""
        return {name: self.root / "heldout" / f"{name}.jsonl" for name in DOMAINS}

    @property
    def calibration(self) -> dict[str, Path]:
        """Text of each domain that the fine-tune was trained on."""
        return {name: self.root / "calibration" / f"{name}.jsonl" for name in DOMAINS}

    @property
    def chat(self) -> bool:
        """Whether its models are asked in conversations."""
        told: dict[str, Any] = json.loads((self.root / "family.json").read_text(encoding="utf-8"))
        return bool(told.get("chat", False))

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def heldout_prompts(self) -> Path:
        return self.root / "heldout_prompts.jsonl"
