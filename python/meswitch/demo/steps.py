"""The steps of a tour that end in files: compress, evaluate, route. What an earlier tour made is found again."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from meswitch.compression.calibration import calibrate
from meswitch.compression.evaluation import evaluate
from meswitch.compression.job import compress
from meswitch.delta.directory import Delta
from meswitch.demo.subject import Subject
from meswitch.progress import Progress, ProgressCallback, relabel
from meswitch.router.routers import evaluate_router, train_router

PRESETS = ("default", "small", "me-switch", "bitdelta")
EVALUATED_TOKENS = 8192


def compress_experts(subject: Subject, progress: ProgressCallback) -> dict[str, dict[str, dict[str, Any]]]:
    """Every expert by every preset. By preset and expert: `path`, `bytes`, `bpw`."""
    for name, finetune in subject.experts.items():
        missing = [preset for preset in PRESETS if not subject.delta(preset, name).exists()]
        statistics = None
        if missing and name in subject.calibration:
            report = _announce(f"calibrating {name}", progress)
            statistics = calibrate(finetune, subject.calibration[name], progress=report)
        for preset in missing:
            path = subject.delta(preset, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            report = _announce(f"compressing {name}, {preset}", progress)
            compress(subject.base, finetune, path, preset, calibration=statistics, progress=report)
    return {preset: {name: _size(subject.delta(preset, name)) for name in subject.experts} for preset in PRESETS}


def _size(path: Path) -> dict[str, Any]:
    with closing(Delta.open(path)) as delta:
        return {"path": str(path), "bytes": delta.nbytes, "bpw": delta.bpw}


def evaluate_experts(subject: Subject, preset: str, progress: ProgressCallback) -> dict[str, dict[str, Any]]:
    """What `Evaluation.to_json` says of every expert that has held-out text."""
    evaluations = {}
    for name, data in subject.heldout.items():
        file = subject.out / "evaluations" / f"{preset}-{name}.json"
        if not file.exists():
            report = _announce(f"evaluating {name}, {preset}", progress)
            delta, finetune = subject.delta(preset, name), subject.experts[name]
            scores = evaluate(subject.base, delta, finetune, data, max_tokens=EVALUATED_TOKENS, progress=report)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(scores.to_json()), encoding="utf-8")
        evaluations[name] = json.loads(file.read_text(encoding="utf-8"))
    return evaluations


def route_prompts(subject: Subject, progress: ProgressCallback) -> dict[str, Any] | None:
    """The router's `path`, and what `route.report` says of it; `None` where there are no labelled prompts."""
    if subject.prompts is None or subject.heldout_prompts is None:
        return None
    path, file = subject.out / "router", subject.out / "router.json"
    if not file.exists():
        progress(Progress("reading prompts", 0, 1))
        train_router(subject.base, subject.prompts, path, progress=progress)
        report = _announce("evaluating the router", progress)
        scores = evaluate_router(subject.base, path, subject.heldout_prompts, progress=report)
        file.write_text(json.dumps({"path": str(path), **scores}), encoding="utf-8")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def _announce(task: str, progress: ProgressCallback) -> ProgressCallback:
    """Reports that `task` begins, since models are loaded first; returns a callback that reports as that task."""
    progress(Progress(task, 0, 1))
    return relabel(progress, task)
