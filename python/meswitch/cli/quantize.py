"""`meswitch quantize`: a whole model in a few bits a weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from meswitch.cli.arguments import Base, DeltaOutput, Json
from meswitch.cli.compress import (
    Bits,
    BitsPerWeight,
    CalibrationText,
    EmbeddingBits,
    TargetSize,
    check_output,
    measure,
    options_of,
    print_choice,
)
from meswitch.terminal.progress import show_imports, show_progress
from meswitch.terminal.tables import format_size, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from meswitch.compression.calibration import Calibration
    from meswitch.compression.options import CompressOptions

DEFAULT_BITS = 4


def quantize(
    base: Base,
    out: DeltaOutput,
    bits: Bits = None,
    embedding_bits: EmbeddingBits = None,
    bpw: BitsPerWeight = None,
    target_size: TargetSize = None,
    calibrate: CalibrationText = None,
    as_json: Json = False,
) -> None:
    """Store a whole model in a few bits a weight, 4 unless told otherwise, to be used as a base.

    Compress fine-tunes against it: their deltas repair what quantizing broke.

    \b
      meswitch quantize base/ -o base-4bit/ --calibrate prompts.jsonl
      meswitch compress base-4bit/ math-finetune/ -o experts/math --calibrate prompts.jsonl
      meswitch quantize base/ -o base-3bit/ --bpw 3
      meswitch evaluate base/ base-4bit/ --data heldout.jsonl
      meswitch restore base-4bit/ -o base-again/

    Interrupted, the same command goes on after the last finished matrix.
    """
    with show_imports():
        chosen = bpw is not None or target_size is not None
        width = DEFAULT_BITS if bits is None and not chosen else bits
        options = options_of("default", width, embedding_bits, "preset", bpw, target_size)
        check_output(out)
    write_quantized(base, out, options, *measure(base, calibrate, options), as_json=as_json)


def write_quantized(
    model: str,
    out: Path,
    options: CompressOptions,
    calibration: Calibration | None,
    sensitivity: dict[str, Tensor] | None,
    *,
    as_json: bool,
) -> None:
    """Quantizes a model and prints what came of it."""
    with show_progress(first="quantizing") as progress:
        from meswitch.compression import job

        report = job.quantize(model, out, options, calibration=calibration, sensitivity=sensitivity, progress=progress)
    if as_json:
        print_json(report.to_json())
    else:
        print_choice(report.chosen)
        typer.echo(f"{out}: {format_size(report.bytes)}, {report.bpw:.2f} bits a weight, in {report.seconds:.1f} s")
