"""`meswitch moe`: one mixture-of-experts model, or several fine-tunes of one, within a budget of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli.arguments import DeltaOutput, Json
from meswitch.cli.choices import usage_errors
from meswitch.cli.compress import CalibrationText, check_output, measure
from meswitch.cli.quantize import write_quantized
from meswitch.cli.share import share
from meswitch.cli.timeline import timeline
from meswitch.sizes import parse_bytes
from meswitch.terminal.progress import show_imports, show_progress
from meswitch.terminal.tables import format_share, format_size, make_table, print_json, stdout_console

if TYPE_CHECKING:
    from meswitch.compression.moe_plan import MoePlan

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="The mixture-of-experts model: a folder or a hub id, in 16 or 32 bits.")
]
Budget = Annotated[
    str,
    typer.Option(metavar="SIZE", help="The bytes that the whole directory may take: 8GiB, 24GB, …"),
]
AnyBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help="Say what fits in this: 8GiB, 24GB, … (default: sizes only).", show_default=False
    ),
]

moe_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Fit a mixture-of-experts (MoE) model, or several fine-tunes of one, into a budget of memory.

    Precision is what gives: every MoE expert stays, in as many bits as its errors cost. Or only those that a task needs
    stay, in all their bits: profile says which.

    \b
      meswitch moe plan model/ --budget 8GiB
      meswitch moe compress model/ -o model-8gib/ --budget 8GiB --calibrate prompts.jsonl
      meswitch generate model-8gib/ "What is 17 * 23?"
      meswitch moe profile model/ --data prompts.jsonl -o profile.json
      meswitch moe share math/ code/ -o shared/ --budget 40GiB
      meswitch moe timeline trace.jsonl -o residency.png
    """,
)


@moe_app.command("plan")
def plan(model: Model, budget: AnyBudget = None, as_json: Json = False) -> None:
    """Say what a model takes at each bit width, and what fits; reads headers, no weights.

    The trunk is everything but MoE experts. A token reads the trunk and the MoE experts that its gates choose, so the
    memory's bandwidth divided by "a token reads" bounds tokens a second. 16 bits are weights as they are.

    \b
      meswitch moe plan model/
      meswitch moe plan model/ --budget 8GiB --json
    """
    with show_imports(), usage_errors():
        from meswitch.compression.moe_plan import plan_moe

        limit = parse_bytes(budget, "--budget")
    found = plan_moe(model, limit)
    if as_json:
        print_json(found.to_json())
    else:
        _print_plan(found)


@moe_app.command("compress")
def compress(
    model: Model,
    out: DeltaOutput,
    budget: Budget,
    calibrate: CalibrationText = None,
    as_json: Json = False,
) -> None:
    """Store a model within a budget: each matrix gets the bits that its errors are worth, from 1 to 16.

    With --calibrate a MoE expert is measured by the tokens that its gate sends to it: one that is used much gets more
    bits than one that is not, and codes make up for one another. Without, matrices count alike, a weight a weight. The
    directory is a quantized base: `generate`, `evaluate`, `restore` and `compress` take it.

    \b
      meswitch moe compress model/ -o model-8gib/ --budget 8GiB --calibrate prompts.jsonl
      meswitch evaluate model/ model-8gib/ --data heldout.jsonl

    Interrupted, the same command goes on after the last finished matrix.
    """
    with show_imports(), usage_errors():
        from meswitch.compression.moe_plan import moe_skeleton
        from meswitch.compression.options import CompressOptions
        from meswitch.huggingface.checkpoint import Checkpoint

        options = CompressOptions(budget_bytes=parse_bytes(budget, "--budget"))
        check_output(out)
        moe_skeleton(Checkpoint.open(model))
    write_quantized(model, out, options, *measure(model, calibrate, options), as_json=as_json)


@moe_app.command("profile")
def profile(
    model: Model,
    data: Annotated[
        Path, typer.Option(metavar="FILE", help="Text (.txt or .jsonl) of the task, of which 16,384 tokens are read.")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="The profile to write, replaced if it is there.")
    ],
    moe_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that MoE experts may take while the model runs (default: the whole model is loaded).",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure over text what each MoE expert adds, for --moe-mode virtual to begin with those that matter.

    A profile is of one model and one kind of text. An engine that has it gives each layer as many resident MoE experts
    as are worth most within its budget.

    \b
      meswitch moe profile model/ --data prompts.jsonl -o profile.json
      meswitch generate model/ --moe-budget 8GiB --moe-mode virtual --moe-profile profile.json "What is 17 * 23?"
    """
    with show_imports(), usage_errors():
        from meswitch.moe.profile import measure_profile

        budget = parse_bytes(moe_budget, "--moe-budget")
    if not out.absolute().parent.is_dir():  # said before the model is loaded
        raise FileNotFoundError(f"expected a folder to write the profile in, found none: {out.absolute().parent}")
    with show_progress(first="profiling") as progress:
        found = measure_profile(model, data, moe_budget=budget, progress=progress)
    found.write(out)
    summary = found.summary()
    if as_json:
        print_json(summary)
        return
    table = make_table("layer", "MoE experts >", "never chosen >", "of the importance, in the largest quarter >")
    for row in summary["layers"]:
        table.add_row(
            row["module"], *(str(row[key]) for key in ("moe_experts", "unused")), format_share(row["quarter"])
        )
    stdout_console().print(table)
    typer.echo(f"{out}: {summary['tokens']:,} tokens")


moe_app.command("share")(share)
moe_app.command("timeline")(timeline)


def _print_plan(found: MoePlan) -> None:
    chosen = "some" if found.top_k is None else str(found.top_k)
    typer.echo(
        f"{found.model}: {found.moe_layers} layers of {found.moe_experts} MoE experts, {chosen} a token\n"
        f"trunk {format_size(found.trunk_bytes)}, MoE experts {format_size(found.moe_expert_bytes)}, of which "
        f"{format_size(found.layer_bytes)} a layer"
    )
    columns = ["trunk, bits >", "MoE experts, bits >", "size >", "a token reads >"]
    table = make_table(*columns, *([] if found.budget is None else ["fits"]))
    for size in found.sizes:
        row = [str(size.trunk_bits), str(size.moe_expert_bits), format_size(size.bytes)]
        row += [format_size(size.bytes_per_token)]
        table.add_row(*row, *([] if size.fits is None else ["yes" if size.fits else "no"]))
    stdout_console().print(table)
    least = format_size(found.smallest_bytes)
    if found.budget is not None:
        verdict = "possible" if found.possible else "not possible"
        typer.echo(f"{format_size(found.budget)}: {verdict}; the least is about {least}, 1 bit in every matrix")
