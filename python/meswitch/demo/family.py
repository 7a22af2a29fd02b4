"""The families: a base and full fine-tunes of it, for the tour, the tests and every number about quality.

    tiny     trained on the spot from text that every machine has, in about two minutes
    moe      the same text and steps with 32 MoE experts a layer, in about ten minutes
    smol     SmolLM2-135M-Instruct, which comes as a Python package, and fine-tunes of it that take about an hour

    <cache>/NAME-<key>/
        base/  finetunes/{code,maths,prose}/       ordinary Hugging Face checkpoints, bfloat16
        heldout/  calibration/                     {domain}.jsonl, lines {"text"} or {"messages"}
        prompts.jsonl  heldout_prompts.jsonl       lines {"prompt", "expert"}
        family.json                                the settings, and how long it took

The key is a hash of the settings. Training goes into a temporary folder that is renamed at the end, under a lock, so
an interrupted run leaves nothing behind that looks finished and two runs at once train once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from meswitch.demo.moe import MoeSettings
from meswitch.demo.paths import Family
from meswitch.demo.smol import SmolSettings
from meswitch.demo.tiny import TinySettings
from meswitch.progress import ProgressCallback
from meswitch.terminal.progress import show_progress

RECIPE = 1  # counts up whenever the same settings would train something else
FAMILIES: dict[str, TinySettings | SmolSettings] = {
    "tiny": TinySettings(),
    "moe": MoeSettings(),
    "smol": SmolSettings(),
}


def cache_folder() -> Path:
    """`$MESWITCH_CACHE`, or `meswitch` in the user's cache folder."""
    if folder := os.environ.get("MESWITCH_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meswitch"


def family(name: str = "tiny", *, seed: int = 0, progress: ProgressCallback | None = None) -> Family:
    """The family of this name, trained now unless the cache has it.

    Without `progress`, training shows itself on stderr.
    Raises `ValueError` for an unknown name, `DataError` where Python came without its source files.
    """
    if name not in FAMILIES:
        raise ValueError(f"expected a family, one of {', '.join(FAMILIES)}, found: {name}")
    settings = FAMILIES[name]
    key = hashlib.sha256(json.dumps([RECIPE, seed, asdict(settings)]).encode()).hexdigest()[:12]
    root = cache_folder() / f"{name}-{key}"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{root}.lock"):
            if not root.exists():
                with _new_folder(root) as folder, show_progress(progress, keep=True) as show:
                    started = time.monotonic()
                    settings.train(Family(folder), seed, show)
                    _write_report(folder, settings, seed, time.monotonic() - started)
    return Family(root)


@contextmanager
def _new_folder(root: Path) -> Iterator[Path]:
    """A folder to write into that becomes `root` at the end; what interrupted runs left beside it is removed."""
    for stale in root.parent.glob(f"{root.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{root.name}.partial-", dir=root.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_report(root: Path, settings: TinySettings | SmolSettings, seed: int, seconds: float) -> None:
    report = {"recipe": RECIPE, "seed": seed, **asdict(settings), "seconds": round(seconds, 1)}
    (root / "family.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
