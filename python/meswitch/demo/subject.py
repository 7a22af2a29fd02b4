"""The models of a tour, and the text about them: a family of ours, or models of one's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meswitch import __version__
from meswitch.demo.family import cache_folder, family
from meswitch.demo.training import write_lines
from meswitch.expert_name import check_name
from meswitch.huggingface.checkpoint import resolve
from meswitch.progress import ProgressCallback
from meswitch.router.route import read_examples

_HELDOUT_EVERY = 5  # lines of an expert


@dataclass(frozen=True)
class Subject:
    """What a tour is about. By expert: its checkpoint, and text (`.jsonl`) to calibrate and to evaluate on.

    `prompts` and `heldout_prompts`: labelled prompts, `None` where there are none. `chat`: prompts are sent as
    conversations.
    """

    base: Path
    experts: dict[str, Path]
    out: Path
    calibration: dict[str, Path] = field(default_factory=dict)
    heldout: dict[str, Path] = field(default_factory=dict)
    prompts: Path | None = None
    heldout_prompts: Path | None = None
    chat: bool = False

    def delta(self, preset: str, name: str) -> Path:
        """Where the delta of an expert lies."""
        return self.out / preset / name


def family_subject(name: str, out: str | Path | None, progress: ProgressCallback) -> Subject:
    """The family of this name, trained where the cache has none."""
    models = family(name, progress=progress)
    folder = Path(out) if out else models.root / "tour"
    return Subject(
        base=models.base,
        experts=models.experts,
        out=folder / _key([models.base, *models.experts.values()]),
        calibration=models.calibration,
        heldout=models.heldout,
        prompts=models.prompts,
        heldout_prompts=models.heldout_prompts,
        chat=models.chat,
    )


def own_subject(
    model: str | Path, experts: Mapping[str, str | Path], data: str | Path | None, out: str | Path | None
) -> Subject:
    """Models of one's own: folders or hub ids. `data`: labelled prompts, with completions or without.

    Raises `ExpertNameError` for a name that no expert can have.
    """
    for name in experts:
        check_name(name)  # it is a folder's name too
    base, checkpoints = resolve(model), {name: resolve(path) for name, path in experts.items()}
    folder = (Path(out) if out else cache_folder() / "tour") / _key([base, *checkpoints.values()])
    if data is None:
        return Subject(base, checkpoints, folder)
    return _with_data(Subject(base, checkpoints, folder), Path(data))


def _key(models: list[Path]) -> str:
    """Changes when a model's files or the library do."""
    files = sorted(file for model in models for file in model.glob("*") if file.is_file())
    stamps = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([__version__, stamps]).encode()).hexdigest()[:12]


def _with_data(subject: Subject, data: Path) -> Subject:
    """The subject with the files a tour needs, written from labelled lines: each fifth of an expert is held out."""
    read_examples(data, list(subject.experts))  # raises what is wrong with the file, by line
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    folder = subject.out / "data"
    sides: dict[str, list[dict[str, Any]]] = {"calibration": [], "heldout": []}
    files: dict[str, dict[str, Path]] = {"calibration": {}, "heldout": {}}
    for name in dict.fromkeys(line["expert"] for line in lines):
        labelled = [line for line in lines if line["expert"] == name]
        heldout = labelled[::_HELDOUT_EVERY]
        rest = [line for number, line in enumerate(labelled) if number % _HELDOUT_EVERY]
        for side, part in (("heldout", heldout), ("calibration", rest)):
            sides[side] += part
            if name in subject.experts and part:
                files[side][name] = folder / side / f"{name}.jsonl"
                write_lines(files[side][name], part)
    prompts: dict[str, Path] = {}
    if sides["calibration"]:
        prompts = {"prompts": folder / "prompts.jsonl", "heldout_prompts": folder / "heldout_prompts.jsonl"}
        write_lines(prompts["prompts"], sides["calibration"])
        write_lines(prompts["heldout_prompts"], sides["heldout"])
    return replace(subject, **files, **prompts)  # type: ignore[arg-type]
