"""The whole library in one run: compress, evaluate, route, and answer one batch of everybody's prompts.

    fine-tunes ── calibrate, compress by every preset ── evaluate ─┐
    labelled prompts ── train the router ── evaluate ──────────────┼── one report, printed or as JSON
    held-out prompts ── Engine, expert="auto", against the base ───┘

On a family of ours, or on models of your own. What was made once is kept under the output folder and found again.
"""

from __future__ import annotations

import hashlib
import json as jsons
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch import __version__
from meswitch.progress import Progress, ProgressCallback, relabel
from meswitch.terminal.progress import show_progress
from meswitch.terminal.tables import shorten

if TYPE_CHECKING:
    from rich.console import Console

PRESETS = ("default", "small", "me-switch", "bitdelta")
SERVED = "default"  # the preset whose deltas answer
EVALUATED = 8192  # tokens an evaluation looks at
NEW_TOKENS = 48
PROMPTS_EACH = 2  # in the mixed batch, of every expert
ROUNDS = 3
_MIB = 2**20


@dataclass(frozen=True)
class Subject:
    """The models of a tour, and what text there is about them."""

    base: Path
    experts: dict[str, Path]
    out: Path
    calibration: dict[str, Path] = field(default_factory=dict)
    heldout: dict[str, Path] = field(default_factory=dict)
    prompts: Path | None = None
    heldout_prompts: Path | None = None
    chat: bool = False  # prompts are asked as conversations

    def delta(self, preset: str, name: str) -> Path:
        return self.out / preset / name


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
    """Takes the tour, prints what it found (`json`: as one JSON value) and returns it.

    Without `model`, the `family` of that name is the subject and is trained first. With it, `experts` are full
    fine-tunes by name, and `data` is a `.jsonl` file of lines `{"prompt", "expert"[, "completion"]}`: each fifth line
    is held out to evaluate, the others calibrate and train the router. Without `data` there is no evaluation and no
    routing. Deltas and router stay under `out`, which is by default beside the family, or in the cache.

    Raises `ValueError` for a model without experts, and what each step raises.
    """
    if (model is None) != (not experts):
        raise ValueError("expected model and experts together, found one of them")
    with show_progress(progress, keep=True) as shown:
        own = model is None
        subject = _own_family(family, out, shown) if own else _given(model or "", experts or {}, data, out)
        report = _report(subject, shown)
    if json:
        print(jsons.dumps(report))
    else:
        _print(report)
    return report


def _report(subject: Subject, shown: ProgressCallback) -> dict[str, Any]:
    deltas = _compress(subject, shown)
    return {
        "base": {"path": str(subject.base), "bytes": _weight_bytes(subject.base)},
        "experts": {name: {"path": str(p), "bytes": _weight_bytes(p)} for name, p in subject.experts.items()},
        "deltas": deltas,
        "evaluations": {preset: _evaluate(subject, preset, shown) for preset in PRESETS},
        "router": _route(subject, shown),
        "serving": _serve(subject, shown),
        "out": str(subject.out),
    }


# --- subjects -----------------------------------------------------------------------------------------------------


def _own_family(name: str, out: str | Path | None, shown: ProgressCallback) -> Subject:
    from meswitch.demo.family import family

    made = family(name, progress=shown)
    folder = Path(out) if out else made.root / "tour"
    return Subject(
        base=made.base,
        experts=made.experts,
        out=folder / _key([made.base, *made.experts.values()]),
        calibration=made.calibration,
        heldout=made.heldout,
        prompts=made.prompts,
        heldout_prompts=made.heldout_prompts,
        chat=made.chat,
    )


def _given(
    model: str | Path, experts: Mapping[str, str | Path], data: str | Path | None, out: str | Path | None
) -> Subject:
    from meswitch.demo.family import cache_folder
    from meswitch.huggingface.checkpoint import resolve

    base, resolved = resolve(model), {name: resolve(path) for name, path in experts.items()}
    folder = (Path(out) if out else cache_folder() / "tour") / _key([base, *resolved.values()])
    if data is None:
        return Subject(base, resolved, folder)
    return Subject(base, resolved, folder, **_split(Path(data), list(resolved), folder / "data"))


def _key(models: list[Path]) -> str:
    """Changes when a model's files or the library do."""
    files = sorted(file for model in models for file in model.glob("*") if file.is_file())
    seen = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(jsons.dumps([__version__, seen]).encode()).hexdigest()[:12]


def _split(data: Path, names: list[str], folder: Path) -> dict[str, Any]:
    """Labelled lines to the files a tour wants: each fifth line of an expert is held out."""
    from meswitch.router.route import read_examples

    read_examples(data, names)  # refuses what is wrong with the file, by line
    lines = [jsons.loads(line) for line in data.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    found: dict[str, Any] = {"calibration": {}, "heldout": {}}
    sides: dict[str, list[dict[str, Any]]] = {"calibration": [], "heldout": []}
    for name in dict.fromkeys(line["expert"] for line in lines):
        own = [line for line in lines if line["expert"] == name]
        parts = {"heldout": own[::5], "calibration": [line for k, line in enumerate(own) if k % 5]}
        for side, part in parts.items():
            sides[side] += part
            if name in names and part:
                found[side][name] = _write_lines(folder / side / f"{name}.jsonl", part)
    if sides["calibration"]:
        found["prompts"] = _write_lines(folder / "prompts.jsonl", sides["calibration"])
        found["heldout_prompts"] = _write_lines(folder / "heldout_prompts.jsonl", sides["heldout"])
    return found


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(jsons.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# --- steps --------------------------------------------------------------------------------------------------------


def _compress(subject: Subject, shown: ProgressCallback) -> dict[str, dict[str, dict[str, Any]]]:
    """By preset and expert: `path`, `bytes`, `bpw`."""
    from meswitch.compression.calibration import calibrate
    from meswitch.compression.job import compress

    for name, finetune in subject.experts.items():
        missing = [preset for preset in PRESETS if not subject.delta(preset, name).exists()]
        what, seen = f"compressing {name}", None
        if missing and name in subject.calibration:
            shown(Progress(what, 0, len(missing) + 1))
            seen = calibrate(finetune, subject.calibration[name])
        for number, preset in enumerate(missing):
            shown(Progress(what, number + 1, len(missing) + 1))
            path = subject.delta(preset, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            compress(subject.base, finetune, path, preset, calibration=seen)
        if missing:
            shown(Progress(what, len(missing) + 1, len(missing) + 1))
    return {preset: {name: _weigh(subject.delta(preset, name)) for name in subject.experts} for preset in PRESETS}


def _weigh(path: Path) -> dict[str, Any]:
    from meswitch.delta.directory import Delta

    with closing(Delta.open(path)) as delta:
        return {"path": str(path), "bytes": delta.nbytes, "bpw": delta.bpw}


def _evaluate(subject: Subject, preset: str, shown: ProgressCallback) -> dict[str, dict[str, Any]]:
    from meswitch.compression.evaluation import evaluate

    found = {}
    for name, data in subject.heldout.items():
        kept, what = subject.out / "evaluations" / f"{preset}-{name}.json", f"evaluating {name}, {preset}"
        if not kept.exists():
            delta, finetune = subject.delta(preset, name), subject.experts[name]
            measured = evaluate(
                subject.base, delta, finetune, data, max_tokens=EVALUATED, progress=relabel(shown, what)
            )
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(jsons.dumps(measured.to_json()), encoding="utf-8")
        found[name] = jsons.loads(kept.read_text(encoding="utf-8"))
    return found


def _route(subject: Subject, shown: ProgressCallback) -> dict[str, Any] | None:
    from meswitch.router.routers import evaluate_router, train_router

    if subject.prompts is None or subject.heldout_prompts is None:
        return None
    path, kept = subject.out / "router", subject.out / "router.json"
    if not kept.exists():
        train_router(subject.base, subject.prompts, path, progress=relabel(shown, "training the router"))
        measured = evaluate_router(
            subject.base, path, subject.heldout_prompts, progress=relabel(shown, "evaluating the router")
        )
        kept.write_text(jsons.dumps({"path": str(path), **measured}), encoding="utf-8")
    found: dict[str, Any] = jsons.loads(kept.read_text(encoding="utf-8"))
    return found


def _serve(subject: Subject, shown: ProgressCallback) -> dict[str, Any]:
    """One batch of every expert's prompts, and the same batch on the base alone, in turn."""
    from meswitch.engine.engine import Engine

    prompts, labels = _batch(subject)
    routed = subject.prompts is not None
    shown(Progress("answering a mixed batch", 0, ROUNDS))
    deltas = {name: subject.delta(SERVED, name) for name in subject.experts}
    with Engine(subject.base, experts=deltas, router=subject.out / "router" if routed else None) as engine:
        mixed: str | list[str] = "auto" if routed else labels
        answers = _ask(engine, subject, prompts, mixed)  # also warms up
        chosen = [answer.expert for answer in answers]
        speeds: dict[str, list[float]] = {"mixed": [], "base": []}
        for number in range(ROUNDS):
            for who, expert in (("mixed", chosen), ("base", ["base"] * len(prompts))):
                speeds[who].append(_tokens_per_second(engine, subject, prompts, expert))
            shown(Progress("answering a mixed batch", number + 1, ROUNDS))
    return {
        "requests": len(prompts),
        "mixed_tokens_per_second": max(speeds["mixed"]),
        "base_tokens_per_second": max(speeds["base"]),
        "answers": [
            {"prompt": prompt, "label": label, "expert": answer.expert, "text": answer.text}
            for prompt, label, answer in zip(prompts, labels, answers, strict=True)
        ],
    }


def _ask(engine: Any, subject: Subject, prompts: list[str], expert: str | list[str]) -> list[Any]:
    if subject.chat:
        said = [[{"role": "user", "content": prompt}] for prompt in prompts]
        answers: list[Any] = engine.chat(said, expert=expert, max_new_tokens=NEW_TOKENS)
    else:
        answers = engine.generate(prompts, expert=expert, max_new_tokens=NEW_TOKENS)
    return answers


def _tokens_per_second(engine: Any, subject: Subject, prompts: list[str], expert: list[str]) -> float:
    started = time.perf_counter()
    answers = _ask(engine, subject, prompts, expert)
    return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)


def _batch(subject: Subject) -> tuple[list[str], list[str]]:
    """Prompts and whose they are: the held-out ones, or one sentence for all."""
    if subject.heldout_prompts is None:
        labels = [name for name in subject.experts for _ in range(PROMPTS_EACH)]
        return ["Write one sentence about the sea."] * len(labels), labels
    from meswitch.router.route import read_examples

    examples = read_examples(subject.heldout_prompts)
    taken = [
        example for name in subject.experts for example in [e for e in examples if e.expert == name][:PROMPTS_EACH]
    ]
    return [example.prompt for example in taken], [example.expert for example in taken]


# --- what is printed ----------------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 120
    console = Console(width=width, highlight=False)
    _print_sizes(report, console)
    _print_routing(report, console)
    _print_serving(report, console)
    console.print("[bold]Where it lies[/]")
    console.print(f"  base    {report['base']['path']}", soft_wrap=True)
    for name, expert in report["experts"].items():
        console.print(f"  {name:<7} {expert['path']}", soft_wrap=True)
    console.print(f"  deltas  {report['out']}", soft_wrap=True)


def _print_sizes(report: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    names, evaluations = list(report["experts"]), report["evaluations"]
    weights = sum(delta["bytes"] / delta["bpw"] for delta in report["deltas"][SERVED].values())
    full = sum(expert["bytes"] for expert in report["experts"].values())
    measured = [name for name in names if name in evaluations[SERVED]]
    table = Table(title=f"{len(names)} fine-tunes as deltas", title_justify="left", title_style="bold")
    for column in ("preset", "size MiB", "bits a weight", "smaller by", *(f"{name} kept" for name in measured)):
        table.add_column(column, justify="left" if column == "preset" else "right")
    table.add_row("(full)", f"{full / _MIB:.2f}", f"{full / weights:.2f}", "1.0x", *("100.0 %" for _ in measured))
    for preset, deltas in report["deltas"].items():
        size = sum(delta["bytes"] for delta in deltas.values())
        bpw = sum(delta["bpw"] for delta in deltas.values()) / len(deltas)
        shares = [_percent(evaluations[preset][name]["recovered_share"]) for name in measured]
        table.add_row(preset, f"{size / _MIB:.2f}", f"{bpw:.2f}", f"{full / size:.1f}x", *shares)
    console.print(table)
    for name in measured:
        score = evaluations[SERVED][name]
        nll = {
            who: f"{score[who]['nll']:.3f}" for who in ("base", "finetune", "expert") if score[who]["nll"] is not None
        }
        said = f"base {nll.get('base', '-')}, fine-tune {nll['finetune']}, delta {nll['expert']}"
        console.print(f"  {name}: {said} nats a token on held-out text ({SERVED})")
    if measured:
        console.print("  kept: the share of the fine-tune's gain over the base that is left in the delta")
    console.print()


def _print_routing(report: dict[str, Any], console: Console) -> None:
    router = report["router"]
    if router is None:
        return
    console.print("[bold]Routing[/]")
    prompts = sum(row["prompts"] for row in router["per_expert"].values())
    console.print(f"  {_percent(router['accuracy'])} of {prompts} unseen prompts went to their expert")
    for name, row in router["per_expert"].items():
        if row["prompts"]:
            console.print(f"  {name}: {_percent(row['recall'])} of {row['prompts']}")
    console.print()


def _print_serving(report: dict[str, Any], console: Console) -> None:
    serving = report["serving"]
    mixed, base = serving["mixed_tokens_per_second"], serving["base_tokens_per_second"]
    console.print(f"[bold]One batch of {serving['requests']} requests, {len(report['experts'])} experts[/]")
    for answer in serving["answers"]:
        line = f"  {answer['expert']}: {shorten(answer['prompt'], 40, keep_end=True)} → {shorten(answer['text'], 60)}"
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"  {mixed:.0f} tokens/s mixed, {base:.0f} tokens/s with the base alone: {_percent(mixed / base)}")
    console.print()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
