"""The `meswitch` command: parses, calls, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 refused or broken (the error's name, message
and hint on stderr), 2 wrong usage, 130 interrupted. torch and transformers are imported by the commands that need them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from meswitch.cli.app import Base, DeltaDir, Json, app, main, router_app
from meswitch.cli.choices import check_choice
from meswitch.terminal.progress import show_progress, show_status
from meswitch.terminal.tables import format_number, format_size, make_table, print_json, stdout_console

if TYPE_CHECKING:
    pass
_BITS = (1, 2, 3, 4, 8)
_METHODS = ("auto", "whole", "blocks")
app.add_typer(router_app, name="router")


@app.command()
def compress(
    base: Base,
    finetune: Annotated[str, typer.Argument(metavar="FINETUNE", help="The fine-tune: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The delta directory to write.")],
    preset: Annotated[str, typer.Option(help="default, small, me-switch or bitdelta.")] = "default",
    bits: Annotated[int | None, typer.Option(help="1, 2, 3, 4 or 8: bits of every site, whatever the preset.")] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(help="1, 2, 3, 4 or 8: bits of embeddings and head, whatever the preset.")
    ] = None,
    method: Annotated[
        str, typer.Option(metavar="preset|auto", help="auto: each matrix gets what it is worth, in the preset's size.")
    ] = "preset",
    bpw: Annotated[
        float | None, typer.Option(metavar="BITS", help="Method auto at this many bits a weight, all included.")
    ] = None,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Method auto in at most this: 1.8GB, 900MiB, … of meswitch.json and delta.safetensors."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text (.txt, .jsonl) to weigh errors by what the model sees."),
    ] = None,
    distill: Annotated[
        bool, typer.Option("--distill", help="Tune the scales on the text of --calibrate: slower, much nearer.")
    ] = False,
    distill_method: Annotated[
        str, typer.Option(help="whole (both models in memory), blocks (one block of both), auto: whole where it fits.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Make a delta directory of a fine-tune.

    \b
      meswitch compress base/ math-finetune/ -o experts/math
      meswitch compress base/ math-finetune/ -o experts/math --preset small --calibrate prompts.jsonl --distill
      meswitch compress base/ math-finetune/ -o experts/math --bpw 1.5 --calibrate prompts.jsonl

    Interrupted, the same command goes on after the last finished site.
    """
    if distill and calibrate is None:
        raise typer.BadParameter("needs the text to tune on: --calibrate FILE", param_hint="--distill")
    check_choice("--method", method, ("preset", "auto"))
    target_bytes = _target(bpw, target_size)
    auto = method == "auto" or bpw is not None or target_bytes is not None
    if auto and (bits or embedding_bits):
        raise typer.BadParameter("bits are chosen by --method auto, --bpw and --target-size", param_hint="--bits")
    from meswitch.compression.calibration import calibrate as observe
    from meswitch.compression.job import compress as write
    from meswitch.compression.options import CompressOptions
    from meswitch.compression.presets import PRESETS

    check_choice("--preset", preset, PRESETS)
    check_choice("--distill-method", distill_method, _METHODS)
    for option, width in (("--bits", bits), ("--embedding-bits", embedding_bits)):
        if width is not None:
            check_choice(option, width, _BITS)
    options = CompressOptions(preset, bits, embedding_bits, method, bpw, target_bytes)  # type: ignore[arg-type]
    seen, sensitivity = None, None
    if calibrate is not None:
        with show_progress() as progress:
            seen = observe(finetune, calibrate, progress=progress)
        if auto:
            from meswitch.compression.sensitivity import measure_sensitivity

            with show_progress() as progress:
                sensitivity = measure_sensitivity(finetune, calibrate, seen, progress=progress)
    elif auto:
        typer.echo("no --calibrate: the same relative error counts alike in every matrix, a weight a weight", err=True)
    with show_progress() as progress:
        made = write(
            base,
            finetune,
            out,
            options,
            calibration=seen,
            sensitivity=sensitivity,
            progress=progress,
        )
    for field, (ours, theirs) in made.config_changes.items():
        typer.echo(f"warning: the fine-tune computes with another {field}: {theirs!r}, base {ours!r}", err=True)
    if made.config_changes:
        typer.echo("hint: the engine refuses such an expert; `meswitch restore` it, and serve it alone", err=True)
    result = made.to_json()
    if distill and calibrate is not None:
        from meswitch.compression.distillation.job import distill as tune
        from meswitch.compression.distillation.options import DistillOptions

        with show_progress() as progress:
            tuned = tune(base, finetune, out, out, calibrate, DistillOptions(distill_method), progress=progress)  # type: ignore[arg-type]
            result["distilled"] = tuned.to_json()
    if as_json:
        print_json(result)
    else:
        _show_chosen(made.chosen)
        typer.echo(f"{out}: {format_size(made.bytes)}, {made.bpw:.2f} bits a weight, in {made.seconds:.1f} s")


def _target(bpw: float | None, size: str | None) -> int | None:
    """The bytes of --target-size; with --bpw that is wrong usage, as no unit or a wrong one is."""
    from meswitch.errors import RequestError
    from meswitch.sizes import parse_bytes

    if bpw is not None and size is not None:
        raise typer.BadParameter("says the same as --target-size: give one", param_hint="--bpw")
    if bpw is not None and not 0 < bpw < 64:
        raise typer.BadParameter(f"expected bits a weight above 0 and below 64, found {bpw}", param_hint="--bpw")
    try:
        return parse_bytes(size, "--target-size")
    except RequestError as error:
        raise typer.BadParameter(str(error), param_hint="--target-size") from error


def _show_chosen(chosen: list[dict[str, Any]] | None) -> None:
    """What method auto chose, on stderr."""
    if not chosen:
        return
    table = make_table("role", "form", "sites >", "of the bytes >", "of the predicted loss >")
    for row in chosen:
        shares = [format_number(row[key], "{:.1%}") for key in ("bytes_share", "loss_share")]
        table.add_row(row["role"], row["form"], str(row["sites"]), *shares)
    Console(stderr=True, soft_wrap=True).print(table)


@app.command("import")
def import_(
    base: Base,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A LoRA adapter of peft: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The delta directory to write.")],
    as_json: Json = False,
) -> None:
    """Make a delta directory of a LoRA adapter.

    \b
      meswitch import base/ math-lora/ -o experts/math
    """
    from meswitch.compression.lora import import_adapter

    with show_progress() as progress:
        made = import_adapter(base, adapter, out, progress=progress)
    if as_json:
        print_json(made.to_json())
    else:
        typer.echo(f"{out}: {format_size(made.bytes)}, {made.low_rank} low-rank sites, {made.replaced} replaced")


@app.command()
def inspect(delta: DeltaDir, as_json: Json = False) -> None:
    """Show what a delta directory holds, site by site.

    \b
      meswitch inspect experts/math
      meswitch inspect experts/math --json
    """
    from meswitch.delta.directory import Delta

    opened = Delta.open(delta)
    found = opened.inspect()
    if as_json:
        print_json(found)
        return
    table = make_table("site", "kind", "shape >", "bits >", "bpw >", "bytes >", "error >")
    for site in found["sites"]:
        shape, error = "x".join(map(str, site["shape"])), site["relative_error"]
        table.add_row(
            site["name"],
            site["kind"],
            shape,
            _bits(site),
            f"{site['bpw']:.2f}",
            f"{site['bytes']:,}",
            "" if error is None else f"{error:.4f}",
        )
    stdout_console().print(table)
    for kind, sums in found["kinds"].items():
        typer.echo(f"{kind}: {sums['sites']} sites, {sums['parameters']:,} parameters, {format_size(sums['bytes'])}")
    copies = 2 * found["parameters"]
    typer.echo(
        f"total: {found['parameters']:,} parameters, {found['bpw']:.2f} bits a weight, {format_size(found['bytes'])};"
        f" 16-bit copies weigh {format_size(copies)}, {copies / max(found['bytes'], 1):.1f} times as much"
    )
    typer.echo(f"base: {found['base_fingerprint']}")


def _bits(site: dict[str, Any]) -> str:
    if "density" in site:
        return f"sparse {site['density']:.2%}"
    return "" if site["bits"] is None else str(site["bits"])


@app.command()
def verify(
    delta: DeltaDir,
    base: Annotated[str | None, typer.Option(metavar="BASE", help="Also check that this is its base.")] = None,
) -> None:
    """Read every byte of a delta directory and check it.

    Exit code 0 where it is sound, 1 where it is not.

    \b
      meswitch verify experts/math --base base/
    """
    from meswitch.delta.directory import Delta

    with show_status("reading"):
        Delta.open(delta).verify(base)
    typer.echo(f"sound: {delta}")


@app.command()
def restore(
    base: Base,
    delta: DeltaDir,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The checkpoint folder to write.")],
) -> None:
    """Rebuild an ordinary checkpoint from base and delta.

    \b
      meswitch restore base/ experts/math -o merged/
    """
    from meswitch.delta.restoration import restore as rebuild

    with show_progress() as progress:
        rebuild(base, delta, out, progress=progress)
    typer.echo(str(out))


@app.command()
def evaluate(
    base: Base,
    delta: DeltaDir,
    against: Annotated[str, typer.Option(metavar="FINETUNE", help="The fine-tune the delta was made of.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Held-out text: .txt or .jsonl.")],
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Stop after so many tokens.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens seen at a time.")] = 512,
    svd: Annotated[
        bool, typer.Option("--svd", help="Also measure truncated SVDs of equal bytes in the quantized sites' place.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure how much of the fine-tune a delta keeps.

    \b
      meswitch evaluate base/ experts/math --against math-finetune/ --data heldout.jsonl
    """
    from meswitch.compression.evaluation import evaluate as measure

    with show_progress() as progress:
        found = measure(
            base, delta, against, data, max_tokens=max_tokens, window=window, svd=svd, progress=progress
        ).to_json()
    if as_json:
        print_json(found)
        return
    table = make_table("model", "nll >", "perplexity >")
    for name in ("base", "finetune", "expert", "svd"):
        if score := found.get(name):
            table.add_row(name, format_number(score["nll"], "{:.4f}"), format_number(score["perplexity"], "{:.3f}"))
    stdout_console().print(table)
    expert, rival = found["expert"], found.get("svd")
    typer.echo(f"KL(fine-tune, expert) {expert['kl']:.5f} nats a token, top-1 agreement {expert['top1_agreement']:.2%}")
    typer.echo(f"recovered share {format_number(found['recovered_share'], '{:.2%}')} over {found['tokens']:,} tokens")
    if rival:
        rank, share = format_number(rival["rank"], "{:g}"), format_number(rival["recovered_share"], "{:.2%}")
        typer.echo(
            f"SVD of rank {rank} in {format_size(rival['bytes'])}: KL {rival['kl']:.5f}, top-1 agreement"
            f" {rival['top1_agreement']:.2%}, recovered share {share}"
        )


if __name__ == "__main__":
    main()
