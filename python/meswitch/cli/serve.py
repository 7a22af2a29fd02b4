"""`meswitch generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from meswitch.cli.app import Base, Json, app
from meswitch.terminal.progress import quiet_transformers, show_status
from meswitch.terminal.tables import print_json, write_text


@app.command()
def generate(
    base: Base,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts; - reads one from stdin.")],
    experts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder of delta directories, or one delta directory."),
    ] = None,
    expert: Annotated[
        str | None, typer.Option(metavar="NAME|auto|base", help="Who answers; auto asks the router.")
    ] = None,
    router: Annotated[Path | None, typer.Option(metavar="DIR", help="A trained router.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be given again.")] = None,
    as_json: Json = False,
) -> None:
    """Answer prompts with an expert or the base.

    With --router and no --expert the router chooses. Several prompts run as one batch.

    \b
      meswitch generate base/ --experts experts/ --expert math "What is 17 * 23?"
      meswitch generate base/ --experts experts/ --router router/ "What is 17 * 23?" "def quicksort(" --json
    """
    if expert == "auto" and router is None:
        raise typer.BadParameter("auto needs --router", param_hint="--expert")
    from meswitch.engine import Engine

    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    given = {"temperature": temperature, "seed": seed, "stop": stop or None}
    options = {
        "max_new_tokens": max_new_tokens,
        **{name: value for name, value in given.items() if value is not None},
    }
    with quiet_transformers(), show_status("loading the base"):
        engine = Engine(base, experts=_delta_directories(experts), router=router)
    with quiet_transformers(), engine:
        if len(prompts) == 1 and not as_json:
            _stream(engine.stream(prompts[0], expert, **options))
            return
        with show_status("generating"):
            answers = engine.generate(prompts, expert, **options)
    if as_json:
        print_json([_answer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        write_text(f"> {prompt}\n[{answer.expert}] {answer.text}\n\n")


def _delta_directories(folder: Path | None) -> Path | list[Path] | None:
    """A delta directory given where a folder of them is expected stands for itself."""
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of delta directories, found none: {folder}")
    return [folder] if folder is not None and (folder / "meswitch.json").is_file() else folder


def _stream(pieces: Any) -> None:
    for piece in pieces:
        write_text(piece)
    write_text("\n")
    answer = pieces.answer
    if answer is not None:
        typer.echo(f"[{answer.expert}, {answer.finish_reason}]", err=True)


def _answer(prompt: str, answer: Any) -> dict[str, Any]:
    route = answer.route
    return {
        "prompt": prompt,
        "expert": answer.expert,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "route": None
        if route is None
        else {"expert": route.expert, "scores": route.scores, "abstained": route.abstained},
    }
