"""`meswitch moe share`: several fine-tunes of one MoE model within the bytes of little more than one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meswitch.cli.arguments import Json
from meswitch.cli.choices import check_choice, named_files, usage_errors
from meswitch.sizes import parse_bytes
from meswitch.terminal.progress import show_imports, show_progress
from meswitch.terminal.tables import format_number, format_size, make_table, print_json, stdout_console

if TYPE_CHECKING:
    from meswitch.compression.evaluation import Evaluation
    from meswitch.compression.sharing.job import SharingReport

Models = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]MODEL...", help="Two fine-tunes or more: folders or hub ids; NAME is what requests call it."
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--calibrate",
        metavar="NAME=FILE",
        help="Text (.txt or .jsonl) that a model reads first; once for each model (default: all inputs count alike).",
        show_default=False,
    ),
]
Heldout = Annotated[
    list[str] | None,
    typer.Option(
        "--quality",
        metavar="NAME=FILE",
        help="Held-out text to compare a model with what is served of it; once for each (default: none).",
        show_default=False,
    ),
]


def share(
    models: Models,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The folder to write.")],
    budget: Annotated[str, typer.Option(metavar="SIZE", help="Bytes of base and deltas: 60GiB, 900MB, …")],
    plan: Annotated[
        str,
        typer.Option(
            metavar="deltas|owners|medoids",
            help="deltas: a base in few bits, every model as a delta. owners: the MoE experts that are most alike are"
            " those of one model for all, in turn. medoids: those of the nearest model.",
        ),
    ] = "deltas",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="What plan deltas adds deltas to, also a quantized model (default: the most central of the models, or"
            " their mean where it is packed).",
            show_default=False,
        ),
    ] = None,
    base_bits: Annotated[
        str,
        typer.Option(
            metavar="16|8|4|3|2|auto",
            help="Bits at which plan deltas keeps the base; auto: of those that fit, where the deltas lose least.",
        ),
    ] = "auto",
    calibrate: Texts = None,
    quality: Heldout = None,
    as_json: Json = False,
) -> None:
    """Fit several fine-tunes of one MoE model into a budget, for one engine to serve.

    \b
      meswitch moe share math/ code/ chat/ -o shared/ --budget 60GiB
      meswitch moe share math/ code/ -o shared/ --base-bits 4 --budget 30GiB --calibrate math=prompts.jsonl
      meswitch generate shared/base --experts shared/experts --expert math "What is 17 * 23?"
    """
    check_choice("--plan", plan, ["deltas", "owners", "medoids"])
    check_choice("--base-bits", base_bits, ["16", "8", "4", "3", "2", "auto"])
    if plan != "deltas" and (base is not None or base_bits != "auto"):
        raise typer.BadParameter(f"expected plan deltas, found {plan}", param_hint="--base, --base-bits")
    with show_imports():
        size = parse_bytes(budget, "--budget")
        folders = dict(_named_model(model) for model in models)
        texts, heldout = named_files("--calibrate", calibrate, folders), named_files("--quality", quality, folders)
    assert size is not None
    if len(folders) < max(2, len(models)):
        raise typer.BadParameter("expected two models or more, each of another name", param_hint="MODEL")
    calibrations, sensitivities = {}, {}
    with show_progress(first="reading") as progress, usage_errors():
        from meswitch.compression import calibration, sensitivity
        from meswitch.compression.sharing import job

        for name, file in texts.items():
            found = calibration.calibrate(folders[name], file, progress=progress)
            calibrations[name] = found
            if plan == "deltas":
                sensitivities[name] = sensitivity.measure_sensitivity(folders[name], file, found, progress=progress)
        report = job.share(
            folders,
            out,
            size,
            plan=plan,  # type: ignore[arg-type]
            base=base,
            base_bits=None if base_bits == "auto" else int(base_bits),
            calibrations=calibrations,
            sensitivities=sensitivities,
            progress=progress,
        )
    evaluations = {name: _evaluate(report, name, folders[name], file) for name, file in heldout.items()}
    if as_json:
        print_json(report.to_json() | {"quality": {name: found.to_json() for name, found in evaluations.items()}})
    else:
        _print(report, evaluations)


def _named_model(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    return (name, folder) if equals else (Path(text).name, text)


def _evaluate(report: SharingReport, name: str, model: str, data: Path) -> Evaluation:
    with show_progress(first=f"evaluating {name}") as progress:
        from meswitch.compression import evaluation

        return evaluation.evaluate(report.base, report.experts[name], model, data, progress=progress)


def _print(report: SharingReport, evaluations: dict[str, Evaluation]) -> None:
    if report.base_bits is not None:
        typer.echo(f"base in {report.base_bits} bits")
    if report.plan != "deltas":
        typer.echo(f"{report.shared} of {report.moe_experts} MoE experts are one model's for all")
    if report.identical:
        typer.echo(f"{report.identical} of {report.moe_experts} MoE experts are the same in all models")
    if evaluations:
        table = make_table("model", "nll alone >", "nll served >", "KL >")
        for name, found in evaluations.items():
            scores = found.to_json()
            nll = [format_number(scores[who]["nll"], "{:.4f}") for who in ("finetune", "expert")]
            table.add_row(name, *nll, format_number(scores["expert"]["kl"], "{:.5f}"))
        stdout_console().print(table)
    typer.echo(f"base {report.base} and {len(report.experts)} experts: {format_size(report.bytes)}")
