"""The `meswitch` command: parses, calls, prints.

Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 refused or broken (the error's name, message
and hint on stderr), 2 wrong usage, 130 interrupted. torch and transformers are imported by the commands that need them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from meswitch import __version__
from meswitch.errors import MeswitchError

if TYPE_CHECKING:
    from meswitch.compress import Progress

_BITS = (1, 2, 3, 4, 8)
_METHODS = ("auto", "whole", "blocks")
_SHOWN = 10  # misrouted prompts listed


class _Group(TyperGroup):
    """Every command's errors become messages and exit codes here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly
        except (MeswitchError, OSError) as error:
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="""Serve many full fine-tunes of one base model as low-bit deltas.

    \b
      meswitch compress base/ math-finetune/ -o experts/math
      meswitch generate base/ --experts experts/ --expert math "What is 17 * 23?"
      meswitch demo         the whole of it on models trained on the spot
    """,
)
router_app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Train and evaluate routers.

    A router chooses the expert for a prompt that names none.

    \b
      meswitch router train base/ -o router/ --data prompts.jsonl
      meswitch router evaluate base/ router/ --data heldout.jsonl
    """,
)
app.add_typer(router_app, name="router")

Base = Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder or a hub id.")]
DeltaDir = Annotated[Path, typer.Argument(metavar="DIR", help="A delta directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout and nothing else.")]
Labelled = Annotated[Path, typer.Option("--data", metavar="FILE.jsonl", help='Lines {"prompt": …, "expert": …}.')]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meswitch {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of no command."""


# --- deltas -------------------------------------------------------------------------------------------------------


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
    _choice("--method", method, ("preset", "auto"))
    target_bytes = _target(bpw, target_size)
    auto = method == "auto" or bpw is not None or target_bytes is not None
    if auto and (bits or embedding_bits):
        raise typer.BadParameter("bits are chosen by --method auto, --bpw and --target-size", param_hint="--bits")
    _quiet()
    from meswitch.calibration import calibrate as observe
    from meswitch.compress import PRESETS
    from meswitch.compress import compress as write

    _choice("--preset", preset, PRESETS)
    _choice("--distill-method", distill_method, _METHODS)
    for option, width in (("--bits", bits), ("--embedding-bits", embedding_bits)):
        if width is not None:
            _choice(option, width, _BITS)
    seen, sensitivity = None, None
    if calibrate is not None:
        with _progress("calibrating") as step:
            seen = observe(finetune, calibrate, progress=step)
        if auto:
            from meswitch.sensitivity import sense

            with _progress("measuring what errors cost") as step:
                sensitivity = sense(finetune, calibrate, seen, progress=step)
    elif auto:
        typer.echo("no --calibrate: the same relative error counts alike in every matrix, a weight a weight", err=True)
    with _progress("compressing") as step:
        made = write(
            base,
            finetune,
            out,
            preset=preset,
            bits=bits,
            embedding_bits=embedding_bits,
            method=method,
            bpw=bpw,
            target_bytes=target_bytes,
            calibration=seen,
            sensitivity=sensitivity,
            progress=_resumable(step),
        )
    for field, (ours, theirs) in made.config_changes.items():
        typer.echo(f"warning: the fine-tune computes with another {field}: {theirs!r}, base {ours!r}", err=True)
    if made.config_changes:
        typer.echo("hint: the engine refuses such an expert; `meswitch restore` it, and serve it alone", err=True)
    result = made.to_json()
    if distill and calibrate is not None:
        from meswitch.distill import distill as tune

        with _progress("distilling") as step:
            tuned = tune(base, finetune, out, out, calibrate, method=distill_method, progress=step)  # type: ignore[arg-type]
            result["distilled"] = tuned.to_json()
    if as_json:
        _print_json(result)
    else:
        _show_chosen(made.chosen)
        typer.echo(f"{out}: {_size(made.bytes)}, {made.bpw:.2f} bits a weight, in {made.seconds:.1f} s")


def _resumable(step: Callable[[int, int], None]) -> Callable[[Progress], None]:
    """Shows the progress, and says once that it goes on from an earlier run."""
    said = False

    def show(progress: Progress) -> None:
        nonlocal said
        if progress.resumed and not said:
            typer.echo(f"going on from an interrupted run, which did {progress.resumed:,} weights", err=True)
            said = True
        step(progress.done, progress.total)

    return show


def _target(bpw: float | None, size: str | None) -> int | None:
    """The bytes of --target-size; with --bpw that is wrong usage, as no unit or a wrong one is."""
    from meswitch.errors import RequestError
    from meswitch.experts import parse_bytes

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
    table = _table("role", "form", "sites >", "of the bytes >", "of the predicted loss >")
    for row in chosen:
        shares = [_number(row[key], "{:.1%}") for key in ("bytes_share", "loss_share")]
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
    _quiet()
    from meswitch.adapter import import_adapter

    with _progress("importing") as step:
        made = import_adapter(base, adapter, out, progress=lambda p: step(p.done, p.total))
    if as_json:
        _print_json(made.to_json())
    else:
        typer.echo(f"{out}: {_size(made.bytes)}, {made.low_rank} low-rank sites, {made.replaced} replaced")


@app.command()
def inspect(delta: DeltaDir, as_json: Json = False) -> None:
    """Show what a delta directory holds, site by site.

    \b
      meswitch inspect experts/math
      meswitch inspect experts/math --json
    """
    from meswitch.delta import Delta

    opened = Delta.open(delta)
    found = opened.inspect()
    if as_json:
        _print_json(found)
        return
    table = _table("site", "kind", "shape >", "bits >", "bpw >", "bytes >", "error >")
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
    _stdout().print(table)
    for kind, sums in found["kinds"].items():
        typer.echo(f"{kind}: {sums['sites']} sites, {sums['parameters']:,} parameters, {_size(sums['bytes'])}")
    copies = 2 * found["parameters"]
    typer.echo(
        f"total: {found['parameters']:,} parameters, {found['bpw']:.2f} bits a weight, {_size(found['bytes'])};"
        f" 16-bit copies weigh {_size(copies)}, {copies / max(found['bytes'], 1):.1f} times as much"
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
    from meswitch.delta import Delta

    with _status("reading"):
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
    _quiet()
    from meswitch.compress import restore as rebuild

    with _progress("restoring") as step:
        rebuild(base, delta, out, progress=step)
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
    _quiet()
    from meswitch.evaluate import evaluate as measure

    with _progress("evaluating") as step:
        found = measure(
            base, delta, against, data, max_tokens=max_tokens, window=window, svd=svd, progress=step
        ).to_json()
    if as_json:
        _print_json(found)
        return
    table = _table("model", "nll >", "perplexity >")
    for name in ("base", "finetune", "expert", "svd"):
        if score := found.get(name):
            table.add_row(name, _number(score["nll"], "{:.4f}"), _number(score["perplexity"], "{:.3f}"))
    _stdout().print(table)
    expert, rival = found["expert"], found.get("svd")
    typer.echo(f"KL(fine-tune, expert) {expert['kl']:.5f} nats a token, top-1 agreement {expert['top1_agreement']:.2%}")
    typer.echo(f"recovered share {_number(found['recovered_share'], '{:.2%}')} over {found['tokens']:,} tokens")
    if rival:
        typer.echo(
            f"SVD of rank {_number(rival['rank'], '{:g}')} in {_size(rival['bytes'])}: KL {rival['kl']:.5f}, top-1"
            f" agreement {rival['top1_agreement']:.2%}, recovered share {_number(rival['recovered_share'], '{:.2%}')}"
        )


# --- serving ------------------------------------------------------------------------------------------------------


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
    _quiet()
    from meswitch.engine import Engine

    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    given = {"temperature": temperature, "seed": seed, "stop": stop or None}
    options = {
        "max_new_tokens": max_new_tokens,
        **{name: value for name, value in given.items() if value is not None},
    }
    with _status("loading the base"):
        engine = Engine(base, experts=_delta_directories(experts), router=router)
    with engine:
        if len(prompts) == 1 and not as_json:
            _stream(engine.stream(prompts[0], expert, **options))
            return
        with _status("generating"):
            answers = engine.generate(prompts, expert, **options)
    if as_json:
        _print_json([_answer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])
        return
    for prompt, answer in zip(prompts, answers, strict=True):
        _write(f"> {prompt}\n[{answer.expert}] {answer.text}\n\n")


def _delta_directories(folder: Path | None) -> Path | list[Path] | None:
    """A delta directory given where a folder of them is expected stands for itself."""
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of delta directories, found none: {folder}")
    return [folder] if folder is not None and (folder / "meswitch.json").is_file() else folder


def _stream(pieces: Any) -> None:
    for piece in pieces:
        _write(piece)
    _write("\n")
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


# --- routers ------------------------------------------------------------------------------------------------------


@router_app.command("train")
def router_train(
    base: Base,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="The router's folder to write.")],
    data: Labelled,
    kind: Annotated[
        str, typer.Option(metavar="embedding|prompt", help="This version trains: embedding.")
    ] = "embedding",
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Below this probability a prompt goes to the base.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the folds held out.")] = 0,
    as_json: Json = False,
) -> None:
    """Train a router on labelled prompts; "base" is a label too.

    \b
      meswitch router train base/ -o router/ --data prompts.jsonl
    """
    _choice("--kind", kind, ("embedding", "prompt"))
    _quiet()
    from meswitch import router as routers

    with _progress("reading prompts") as step:
        made = routers.train(base, data, out, kind=kind, threshold=threshold, seed=seed, progress=step)
    if as_json:
        numbers = {"temperature": made.temperature, "threshold": made.threshold}
        _print_json({"kind": made.kind, "experts": list(made.experts), **numbers})
    else:
        typer.echo(f"{out}: routes between {', '.join(made.experts)}")


@router_app.command("evaluate")
def router_evaluate(
    base: Base,
    router: Annotated[Path, typer.Argument(metavar="DIR", help="A trained router.")],
    data: Labelled,
    as_json: Json = False,
) -> None:
    """Measure a router on labelled prompts it has not seen.

    \b
      meswitch router evaluate base/ router/ --data heldout.jsonl
    """
    _quiet()
    from meswitch import router as routers

    with _progress("reading prompts") as step:
        found = routers.evaluate(base, router, data, progress=step)
    if as_json:
        _print_json(found)
        return
    table = _table("expert", "prompts >", "recall >", "precision >", "abstained >")
    for name, row in found["per_expert"].items():
        shares = [_number(row[key], "{:.1%}") for key in ("recall", "precision", "abstained")]
        table.add_row(name, str(row["prompts"]), *shares)
    _stdout().print(table)
    typer.echo(
        f"accuracy {found['accuracy']:.2%}, abstained {found['abstained']:.2%},"
        f" calibration error {found['expected_calibration_error']:.3f}"
    )
    for wrong in found["misrouted"][:_SHOWN]:
        _write(f"  {wrong['expert']} sent to {wrong['sent']}: {_short(wrong['prompt'])}\n")
    if len(found["misrouted"]) > _SHOWN:
        typer.echo(f"  and {len(found['misrouted']) - _SHOWN} more: --json lists them all")


# --- trying and asking --------------------------------------------------------------------------------------------


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(metavar="BASE", help="A base of your own.")] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="A fine-tune of it; give one option for each."),
    ] = None,
    family: Annotated[
        str,
        typer.Option(
            help="Models to train on the spot where none are given: tiny (two minutes), or smol, SmolLM2-135M and "
            "fine-tunes of it (an hour, once; needs meswitch[smol])."
        ),
    ] = "tiny",
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help='For your own models: {"prompt", "expert"[, "completion"]} a line.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Where deltas and router stay.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tour the library on small models trained on the spot.

    Training them takes about two minutes, once; or bring your own models.

    \b
      meswitch demo
      meswitch demo --family smol
      meswitch demo --model base/ --experts math=math-finetune/ --experts code=code-finetune/ --data prompts.jsonl
    """
    named = dict(_named(entry) for entry in experts or [])
    if (model is None) != (not named):
        raise typer.BadParameter("--model and --experts go together", param_hint="--model")
    if model is None and data is not None:
        raise typer.BadParameter("the family brings its own data", param_hint="--data")
    from meswitch.demo.family import FAMILIES
    from meswitch.demo.tour import run

    _choice("--family", family, FAMILIES)
    run(model, named or None, family=family, data=data, out=out, json=as_json)


def _named(entry: str) -> tuple[str, str]:
    name, found, folder = entry.partition("=")
    if not (name and found and folder):
        raise typer.BadParameter(f"expected NAME=FOLDER, found {entry!r}", param_hint="--experts")
    return name, folder


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed here and what is used of it.

    Exit code 1 where something that meswitch needs is missing.

    \b
      meswitch doctor
    """
    found = _examine()
    if as_json:
        _print_json(found)
    else:
        for name, value in found.items():
            for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
                text = ", ".join(entry) if isinstance(entry, list) else str(entry)
                typer.echo(f"{f'{name} {key}'.strip():<22} {text or '-'}")
    if found["problems"]:
        raise typer.Exit(1)


def _examine() -> dict[str, Any]:
    import platform

    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    versions = {name: _version(name) for name in packages}
    problems = [f"{name} is not installed" for name in packages if versions[name] == "not installed"]
    native: dict[str, Any] = {"backend": None, "backends": [], "features": []}
    try:
        from meswitch import _native

        features: dict[str, bool] = getattr(_native, "cpu_features", dict)()
        native["features"] = sorted(name for name, there in features.items() if there)
        native["backend"] = getattr(_native, "backend", lambda: None)()
        native["backends"] = getattr(_native, "backends", list)()
    except (ImportError, MeswitchError) as error:
        problems.append(f"meswitch._native does not load: {error}")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "version": {"meswitch": __version__, **versions},
        "cpu": {"count": os.cpu_count(), **native},
        "torch": _torch(),
        "problems": problems,
    }


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"error": str(error)}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "devices": devices}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


# --- printing -----------------------------------------------------------------------------------------------------


def _choice(option: str, found: object, allowed: Any) -> None:
    if found not in allowed:
        expected = ", ".join(map(str, allowed))
        raise typer.BadParameter(f"expected one of {expected}, found {found}", param_hint=option)


def _quiet() -> None:
    """Keep transformers' own bars and notes off stderr: this command shows its own progress."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _write(text: str) -> None:
    """To stdout at once, with what its encoding cannot say replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _stdout() -> Console:
    # Where nobody looks, names are not to be cut to a terminal's width.
    return Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        right = title.endswith(" >")
        table.add_column(title.removesuffix(" >"), justify="right" if right else "left", no_wrap=True)
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:79] + "…"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal, now and then a line elsewhere; both on stderr."""
    if not sys.stderr.isatty():
        yield _lines(what)
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _lines(what: str, every: float = 5.0) -> Callable[[int, int], None]:
    start = last = time.monotonic()

    def step(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < every:
            return
        last = now
        share, passed = done / max(total, 1), now - start
        if done >= total:
            end = f", {passed:.0f} s"
        else:  # less than a hundredth says nothing of the rest
            end = f", {passed / share - passed:.0f} s left" if share >= 0.01 else ""
        typer.echo(f"{what}: {share:.0%}{end}", err=True)

    return step


@contextmanager
def _status(what: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(what):
        yield


def main() -> None:
    """The entry point of the `meswitch` command."""
    app()


if __name__ == "__main__":
    main()
