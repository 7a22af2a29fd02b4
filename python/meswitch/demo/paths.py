"""Where a family of models lies on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch.demo.corpus import DOMAINS


@dataclass(frozen=True)
class Family:
    """The folders and files of a family under `root`; `family.py` says what is in them."""

    root: Path

    @property
    def base(self) -> Path:
        """The base model."""
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
        """Whether its models are prompted with conversations."""
        report: dict[str, Any] = json.loads((self.root / "family.json").read_text(encoding="utf-8"))
        return bool(report.get("chat", False))

    @property
    def prompts(self) -> Path:
        """Labelled prompts from the text that the fine-tunes were trained on."""
        return self.root / "prompts.jsonl"

    @property
    def heldout_prompts(self) -> Path:
        """Labelled prompts from text that no model of the family saw."""
        return self.root / "heldout_prompts.jsonl"
