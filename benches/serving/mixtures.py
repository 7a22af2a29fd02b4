"""Any number of different experts of the tiny family, from its three fine-tunes; they stay in a folder."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from meswitch.compression.job import compress
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.demo.family import family
from meswitch.demo.paths import Family

PROMPTS = 4  # of each domain
LETTERS = 120  # of a prompt at most


@dataclass(frozen=True)
class Mixtures:
    """Experts by number, under `root`. Domains take turns."""

    root: Path
    family: Family
    count: int

    def domain(self, number: int) -> str:
        """The domain that the expert was mostly tuned on."""
        domains = list(self.family.experts)
        return domains[number % len(domains)]

    def delta(self, number: int) -> Path:
        """Its delta directory."""
        return self.root / "deltas" / f"{number:03}"

    def whole(self, number: int) -> Path:
        """Its restored checkpoint, written at the first call."""
        folder = self.root / "wholes" / f"{number:03}"
        if not folder.exists():
            restore(self.family.base, self.delta(number), folder)
        return folder

    @property
    def largest(self) -> int:
        """The most bytes that one takes in memory."""
        return max(Delta.open(self.delta(number)).memory_bytes for number in range(self.count))

    def prompts(self) -> dict[str, list[str]]:
        """A few prompts of each domain that no model has seen."""
        lines = self.family.heldout_prompts.read_text(encoding="utf-8").splitlines()
        found: dict[str, list[str]] = {domain: [] for domain in self.family.experts}
        for example in map(json.loads, lines):
            if len(found[example["expert"]]) < PROMPTS:
                found[example["expert"]].append(example["prompt"][:LETTERS])
        return found


def mixtures(root: Path, count: int) -> Mixtures:
    """`count` experts, each base + a (fine-tune - base) + b (another fine-tune - base); writes what is not there."""
    made = Mixtures(root, family(), count)
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        if not made.delta(number).exists():
            mixed = root / "mixed"
            shutil.rmtree(mixed, ignore_errors=True)
            _write_mixture(made, number, mixed)
            compress(made.family.base, mixed, made.delta(number))
            shutil.rmtree(mixed)
    return made


def _write_mixture(made: Mixtures, number: int, folder: Path) -> None:
    draw, paths = random.Random(number), list(made.family.experts.values())
    own, other = paths[number % len(paths)], paths[(number + draw.choice((1, 2))) % len(paths)]
    shutil.copytree(own, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    base, *tuned = (load_file(path / "model.safetensors") for path in (made.family.base, own, other))
    shares = (draw.uniform(0.6, 1.6), draw.uniform(-0.6, 0.6))
    mixed = {}
    for name, start in base.items():
        moved = sum(share * (end[name].float() - start.float()) for share, end in zip(shares, tuned, strict=True))
        mixed[name] = (start.float() + moved).to(start.dtype)
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
