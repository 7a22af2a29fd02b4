"""`meswitch evaluate`: how much of a fine-tune a delta keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli.arguments import AllowQuantizedBase, Base, DeltaDirectory, Json
from meswitch.terminal.progress import show_progress
from meswitch.terminal.tables import format_number, format_size, make_table, print_json, stdout_console

if TYPE_CHECKING:
    from meswitch.compression.evaluation import Evaluation


def evaluate(
    base: Base,
    delta: DeltaDirectory,
    data: Annotated[Path, typer.Option(metavar="FILE", help="Held-out text: .txt or .jsonl.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FINETUNE",
            help="The fine-tune the delta was made of: a folder or a hub id (default: none, for a quantized model).",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="What the gain is measured from, such as the 16-bit model of a quantized base (default: the base).",
            show_default=False,
        ),
    ] = None,
    allow_quantized_base: AllowQuantizedBase = False,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Stop after so many tokens (default: all of the text).", show_default=False),
    ] = None,
    window: Annotated[
        int, typer.Option(min=2, help="Tokens seen at a time; the first of each window is context only.")
    ] = 512,
    svd: Annotated[
        bool,
        typer.Option(
            "--svd",
            help="Also measure truncated SVDs of equal bytes in place of the quantized sites (default: off).",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure how much of the fine-tune a delta keeps, or a quantized model of the model.

    \b
      meswitch evaluate base/ experts/math --against math-finetune/ --data heldout.jsonl
      meswitch evaluate base/ base-4bit/ --data heldout.jsonl
      meswitch evaluate base-4bit/ experts/math --baseline base/ --against math-finetune/ --data heldout.jsonl
    """
    if against is None:
        for_deltas = {"--baseline": baseline, "--allow-quantized-base": allow_quantized_base, "--svd": svd}
        for option, value in for_deltas.items():
            if value:
                raise typer.BadParameter("it needs --against", param_hint=option)
        _evaluate_quantized(base, delta, data, max_tokens, window, as_json=as_json)
        return
    with show_progress(first="evaluating") as progress:
        from meswitch.compression import evaluation

        found = evaluation.evaluate(
            base,
            delta,
            against,
            data,
            baseline=baseline,
            allow_quantized_base=allow_quantized_base,
            max_tokens=max_tokens,
            window=window,
            svd=svd,
            progress=progress,
        )
    _explain_no_share(found)
    scores = found.to_json()
    if as_json:
        print_json(scores)
    else:
        _print_scores(scores)


def _evaluate_quantized(
    model: str, quantized: Path, data: Path, max_tokens: int | None, window: int, *, as_json: bool
) -> None:
    from meswitch.delta.directory import Delta

    if Delta.open(quantized).kind == "delta":
        raise typer.BadParameter("a delta needs the fine-tune that it was made of", param_hint="--against")
    with show_progress(first="evaluating") as progress:
        from meswitch.compression import evaluation

        found = evaluation.evaluate_quantized(
            model, quantized, data, max_tokens=max_tokens, window=window, progress=progress
        )
    scores = found.to_json()
    if as_json:
        print_json(scores)
        return
    _print_models(scores, ("model", "quantized"))
    typer.echo(
        f"KL(model, quantized) {found.kl:.5f} nats a token, top-1 agreement {found.top1_agreement:.2%}"
        f" over {found.tokens:,} tokens"
    )


def _print_models(scores: dict[str, Any], names: tuple[str, ...]) -> None:
    table = make_table("model", "nll >", "perplexity >")
    for name in names:
        if score := scores.get(name):
            table.add_row(name, format_number(score["nll"], "{:.4f}"), format_number(score["perplexity"], "{:.3f}"))
    stdout_console().print(table)


def _explain_no_share(found: Evaluation) -> None:
    """Why there is no recovered share, on stderr."""
    if found.recovered_share is not None:
        return
    if found.gain is None:
        typer.echo("no recovered share: the text holds tokens that the base has no row for", err=True)
    else:
        typer.echo("no recovered share: the fine-tune predicts this text no better than the base", err=True)
        typer.echo("hint: give the fine-tune itself to --against, and text of its own domain to --data", err=True)


def _print_scores(scores: dict[str, Any]) -> None:
    _print_models(scores, ("base", "finetune", "expert", "svd"))
    expert, svd = scores["expert"], scores.get("svd")
    typer.echo(f"KL(fine-tune, expert) {expert['kl']:.5f} nats a token, top-1 agreement {expert['top1_agreement']:.2%}")
    typer.echo(f"recovered share {format_number(scores['recovered_share'], '{:.2%}')} over {scores['tokens']:,} tokens")
    if svd:
        rank, share = format_number(svd["rank"], "{:g}"), format_number(svd["recovered_share"], "{:.2%}")
        typer.echo(
            f"SVD of rank {rank} in {format_size(svd['bytes'])}: KL {svd['kl']:.5f}, top-1 agreement"
            f" {svd['top1_agreement']:.2%}, recovered share {share}"
        )
