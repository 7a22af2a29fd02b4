"""`meswitch compress` and `meswitch import`: a fine-tune, or a LoRA adapter, to a delta directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from meswitch.cli.arguments import Base, DeltaOutput, Json
from meswitch.cli.choices import check_choice, usage_errors
from meswitch.compression.presets import PRESETS
from meswitch.terminal.progress import show_imports, show_progress
from meswitch.terminal.tables import format_share, format_size, make_table, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from meswitch.compression.calibration import Calibration
    from meswitch.compression.options import CompressOptions

FineTune = Annotated[str, typer.Argument(metavar="FINETUNE", help="The fine-tune: a folder or a hub id.")]
PresetName = Annotated[
    str, typer.Option("--preset", metavar="|".join(PRESETS), help="How matrices, embeddings and head are stored.")
]
Bits = Annotated[
    int | None,
    typer.Option(
        metavar="1|2|3|4|8", help="Bits a weight of every matrix (default: the preset's).", show_default=False
    ),
]
EmbeddingBits = Annotated[
    int | None,
    typer.Option(
        metavar="1|2|3|4|8",
        help="Bits a weight of embeddings and head (default: those of --bits, else the preset's).",
        show_default=False,
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="preset|auto",
        help="preset: each matrix as the preset says. auto: each matrix gets the bits it is worth, within the bytes of"
        " the preset, --bpw or --target-size.",
    ),
]
BitsPerWeight = Annotated[
    float | None,
    typer.Option(
        "--bpw",
        metavar="BITS",
        min=0,
        max=64,
        help="Method auto within this many bits a weight, scales and all else included (default: the preset's).",
        show_default=False,
    ),
]
TargetSize = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Method auto within this many bytes of meswitch.json and delta.safetensors: 1.8GB, 900MiB, …"
        " (default: the preset's).",
        show_default=False,
    ),
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text (.txt or .jsonl) that the fine-tune reads first, up to 16,384 tokens: errors are weighed by what it"
        " sees there (default: all inputs count alike).",
        show_default=False,
    ),
]
Distill = Annotated[
    bool,
    typer.Option(
        "--distill",
        help="Then tune the scales on the text of --calibrate: slower, much nearer to the fine-tune (default: off).",
    ),
]
DistillMethod = Annotated[
    str,
    typer.Option(
        metavar="auto|whole|blocks",
        help="whole: both models in memory. blocks: one block of both at a time. auto: whole where it fits.",
    ),
]


def compress(
    base: Base,
    finetune: FineTune,
    out: DeltaOutput,
    preset: PresetName = "default",
    bits: Bits = None,
    embedding_bits: EmbeddingBits = None,
    method: MethodName = "preset",
    bpw: BitsPerWeight = None,
    target_size: TargetSize = None,
    calibrate: CalibrationText = None,
    distill: Distill = False,
    distill_method: DistillMethod = "auto",
    as_json: Json = False,
) -> None:
    """Make a delta directory of a fine-tune.

    \b
      meswitch compress base/ math-finetune/ -o experts/math
      meswitch compress base/ math-finetune/ -o experts/math --preset small --calibrate prompts.jsonl --distill
      meswitch compress base/ math-finetune/ -o experts/math --bpw 1.5 --calibrate prompts.jsonl

    Interrupted, the same command goes on after the last finished site.
    """
    with show_imports():
        _check_distillation(distill, distill_method, calibrate)
        options = options_of(preset, bits, embedding_bits, method, bpw, target_size)
        check_output(out)
    calibration, sensitivity = measure(finetune, calibrate, options)
    with show_progress(first="compressing") as progress:
        from meswitch.compression import job

        report = job.compress(
            base, finetune, out, options, calibration=calibration, sensitivity=sensitivity, progress=progress
        )
    _warn_of_changes(report.config_changes)
    _print_notes(report.notes)
    result = report.to_json()
    if distill and calibrate is not None:
        result["distilled"] = _distill(base, finetune, out, calibrate, distill_method)
    if as_json:
        print_json(result)
    else:
        print_choice(report.chosen)
        typer.echo(f"{out}: {format_size(report.bytes)}, {report.bpw:.2f} bits a weight, in {report.seconds:.1f} s")


def check_output(out: Path) -> None:
    """Refuses a place where no delta directory can be written, before any work."""
    from meswitch.delta.directory import MANIFEST
    from meswitch.target import resolve_target

    resolve_target(out, replaces=MANIFEST)


def _check_distillation(distill: bool, method: str, data: Path | None) -> None:
    if distill and data is None:
        raise typer.BadParameter("needs the text to tune on: --calibrate FILE", param_hint="--distill")
    if distill or method != "auto":
        from meswitch.compression.distillation.options import METHODS

        check_choice("--distill-method", method, METHODS)


def options_of(
    preset: str,
    bits: int | None,
    embedding_bits: int | None,
    method: str,
    bpw: float | None,
    target_size: str | None,
) -> CompressOptions:
    """The options as the library takes them; what it refuses is wrong usage."""
    from meswitch.compression.options import CompressOptions
    from meswitch.sizes import parse_bytes

    with usage_errors():
        target_bytes = parse_bytes(target_size, "--target-size")
        return CompressOptions(preset, bits, embedding_bits, method, bpw, target_bytes)  # type: ignore[arg-type]


def measure(
    finetune: str, data: Path | None, options: CompressOptions
) -> tuple[Calibration | None, dict[str, Tensor] | None]:
    """What the fine-tune sees in the text, and what errors cost it, as far as the options need them."""
    if data is None:
        if options.chooses_per_site:
            typer.echo(
                "no --calibrate: the same relative error counts alike in every matrix, a weight a weight", err=True
            )
        return None, None
    with show_progress(first="calibrating") as progress:
        from meswitch.compression import calibration, sensitivity

        statistics = calibration.calibrate(finetune, data, progress=progress)
        if not options.chooses_per_site:
            return statistics, None
        return statistics, sensitivity.measure_sensitivity(finetune, data, statistics, progress=progress)


def _distill(base: str, finetune: str, delta: Path, data: Path, method: str) -> dict[str, Any]:
    """Tunes the scales of the delta in place; what `Distillation.to_json` says."""
    with show_progress(first="distilling") as progress:
        from meswitch.compression.distillation import job
        from meswitch.compression.distillation.options import DistillOptions

        options = DistillOptions(method)  # type: ignore[arg-type]
        done = job.distill(base, finetune, delta, delta, data, options, progress=progress)
    return done.to_json()


def _warn_of_changes(changes: dict[str, Any]) -> None:
    """What the fine-tune's config computes in another way than the base's, on stderr."""
    for field, (ours, theirs) in changes.items():
        typer.echo(f"warning: the fine-tune computes with another {field}: {theirs!r}, base {ours!r}", err=True)
    if changes:
        typer.echo("hint: the engine refuses such an expert; `meswitch restore` it, and serve it alone", err=True)


def _print_notes(notes: tuple[str, ...]) -> None:
    """What else is worth a word, on stderr."""
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def print_choice(rows: list[dict[str, Any]] | None) -> None:
    """The forms that method auto chose, on stderr."""
    if not rows:
        return
    table = make_table("role", "form", "sites >", "of the bytes >", "of the predicted loss >")
    for row in rows:
        shares = [format_share(row[key]) for key in ("bytes_share", "loss_share")]
        table.add_row(row["role"], row["form"], str(row["sites"]), *shares)
    Console(stderr=True, soft_wrap=True).print(table)


def import_(
    base: Base,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A LoRA adapter of peft: a folder or a hub id.")],
    out: DeltaOutput,
    as_json: Json = False,
) -> None:
    """Make a delta directory of a LoRA adapter.

    \b
      meswitch import base/ math-lora/ -o experts/math
    """
    with show_progress(first="importing") as progress:
        from meswitch.compression.lora import import_adapter

        report = import_adapter(base, adapter, out, progress=progress)
    _print_notes(report.notes)
    if as_json:
        print_json(report.to_json())
    else:
        typer.echo(f"{out}: {format_size(report.bytes)}, {report.low_rank} low-rank sites, {report.replaced} replaced")
