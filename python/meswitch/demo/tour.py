"""The library in one run: compress, evaluate, route, and answer one batch of every expert's prompts.

    fine-tunes ── calibrate, compress by every preset ── evaluate ─┐
    labelled prompts ── train the router ── evaluate ──────────────┼── one report, printed or as JSON
    held-out prompts ── Engine, expert="auto", against the base ───┘

On a family of ours, or on models of one's own. What was made once is kept under the output folder and found again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meswitch.demo.report import print_report
from meswitch.demo.serving import serve_batch
from meswitch.demo.steps import PRESETS, compress_experts, evaluate_experts, route_prompts
from meswitch.demo.subject import Subject, family_subject, own_subject
from meswitch.progress import ProgressCallback
from meswitch.terminal.progress import show_progress
from meswitch.terminal.tables import print_json


def run(
    model: str | Path | None = None,
    experts: Mapping[str, str | Path] | None = None,
    *,
    family: str = "tiny",
    data: str | Path | None = None,
    out: str | Path | None = None,
    json: bool = False,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Takes the tour, prints its report (`json`: as one JSON value) and returns it.

    Without `model`, the `family` of that name is the subject and is trained first. With it, `experts` are full
    fine-tunes by name, and `data` is a `.jsonl` file of lines `{"prompt", "expert"[, "completion"]}`: each fifth line
    of an expert is held out to evaluate, the others calibrate and train the router. Without `data` there is no
    evaluation and no routing. Deltas and router stay under `out`, which is by default beside the family, or in the
    cache. Without `progress`, progress is shown on stderr.

    Raises `ValueError` for a model without experts, and what each step raises.
    """
    if (model is None) != (not experts):
        raise ValueError("expected model and experts together, found one of them")
    with show_progress(progress, keep=True) as show:
        if model is None or experts is None:
            subject = family_subject(family, out, show)
        else:
            subject = own_subject(model, experts, data, out)
        report = _report(subject, show)
    if json:
        print_json(report)
    else:
        print_report(report)
    return report


def _report(subject: Subject, progress: ProgressCallback) -> dict[str, Any]:
    deltas = compress_experts(subject, progress)
    return {
        "base": {"path": str(subject.base), "bytes": _weight_bytes(subject.base)},
        "experts": {name: {"path": str(p), "bytes": _weight_bytes(p)} for name, p in subject.experts.items()},
        "deltas": deltas,
        "evaluations": {preset: evaluate_experts(subject, preset, progress) for preset in PRESETS},
        "router": route_prompts(subject, progress),
        "serving": serve_batch(subject, progress),
        "out": str(subject.out),
    }


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
