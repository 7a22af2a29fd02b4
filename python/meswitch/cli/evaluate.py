"""`meswitch evaluate`: how much of a fine-tune a delta keeps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meswitch.cli.arguments import Base, DeltaDirectory, Json
from meswitch.terminal.progress import show_progress
from meswitch.terminal.tables import format_number, format_size, make_table, print_json, stdout_console

if TYPE_CHECKING:
    from meswitch.compression.evaluation import Evaluation


def evaluate(
    base: Base,
    delta: DeltaDirectory,
    against: Annotated[
        str, typer.Option(metavar="FINETUNE", help="The fine-tune the delta was made of: a folder or a hub id.")
    ],
    data: Annotated[Path, typer.Option(metavar="FILE", help="Held-out text: .txt or .jsonl.")],
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
    """Measure how much of the fine-tune a delta keeps.

    \b
      meswitch evaluate base/ experts/math --against math-finetune/ --data heldout.jsonl
    """
    with show_progress(first="evaluating") as progress:
        from meswitch.compression import evaluation

        found = evaluation.evaluate(
            base, delta, against, data, max_tokens=max_tokens, window=window, svd=svd, progress=progress
        )
    _explain_no_share(found)
    scores = found.to_json()
    if as_json:
        print_json(scores)
    else:
        _print_scores(scores)


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
    table = make_table("model", "nll >", "perplexity >")
    for name in ("base", "finetune", "expert", "svd"):
        if score := scores.get(name):
            table.add_row(name, format_number(score["nll"], "{:.4f}"), format_number(score["perplexity"], "{:.3f}"))
    stdout_console().print(table)
    expert, svd = scores["expert"], scores.get("svd")
    typer.echo(f"KL(fine-tune, expert) {expert['kl']:.5f} nats a token, top-1 agreement {expert['top1_agreement']:.2%}")
    typer.echo(f"recovered share {format_number(scores['recovered_share'], '{:.2%}')} over {scores['tokens']:,} tokens")
    if svd:
        rank, share = format_number(svd["rank"], "{:g}"), format_number(svd["recovered_share"], "{:.2%}")
        typer.echo(
            f"SVD of rank {rank} in {format_size(svd['bytes'])}: KL {svd['kl']:.5f}, top-1 agreement"
            f" {svd['top1_agreement']:.2%}, recovered share {share}"
        )
