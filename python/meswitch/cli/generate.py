"""`meswitch generate`: answers to prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from meswitch.cli.arguments import AllowQuantizedBase, Base, Json
from meswitch.cli.choices import check_choice, usage_errors
from meswitch.errors import DataError
from meswitch.terminal.progress import quiet_transformers, show_status
from meswitch.terminal.tables import print_json, write_text

Prompts = Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts; - reads one from stdin.")]
ExpertsFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A folder of delta directories, or one delta directory (default: the base alone).",
        show_default=False,
    ),
]
ExpertName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|auto|base",
        help="Which expert answers; auto asks the router (default: auto with --router, else base).",
        show_default=False,
    ),
]
RouterFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A trained router (default: no router).", show_default=False)
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of an answer, at most (default: what the expert's own settings say, else 256).",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="Randomness of the answer, from 0; 0 is greedy (default: greedy).", show_default=False),
]
Seed = Annotated[
    int | None,
    typer.Option(help="The same seed samples the same text (default: another one each time).", show_default=False),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        help="Stop at this text; may be given several times (default: at the expert's own end).", show_default=False
    ),
]
DeviceName = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where the model runs: cpu, cuda, cuda:1 or another of torch.")
]
DeviceBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="With another --device than cpu: its memory that experts may take (default: what --host-budget allows).",
        show_default=False,
    ),
]
KernelsName = Annotated[
    str,
    typer.Option(
        "--kernels",
        metavar="auto|cpu|cuda|torch",
        help="What multiplies with the deltas. cpu, cuda: compressed weights, native code. torch: weights unpacked a"
        " tile at a time, any device. auto: the one that suits the device.",
    ),
]

HostBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that experts may take: 8GiB, 900MB, …; more of them are loaded in turn (default: no bound).",
        show_default=False,
    ),
]
MoeBudget = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory that the MoE experts of a mixture of experts may take: they are read from the checkpoint when a"
        " gate chooses them (default: all are loaded).",
        show_default=False,
    ),
]
MoeMode = Annotated[
    str,
    typer.Option(
        metavar="exact|fallback|virtual",
        help="With --moe-budget. exact: a MoE expert that is not in memory is waited for. fallback: low-bit copies"
        " answer for most of those. virtual: gates choose among those in memory, which follow what is asked.",
    ),
]
MoeCopies = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="What meswitch quantize made of this model: the copies of --moe-mode fallback, or the MoE experts of"
        " --moe-mode virtual (default: the model's own).",
        show_default=False,
    ),
]
MoeFetched = Annotated[
    int,
    typer.Option(
        min=1, metavar="COUNT", help="Choices of a token that --moe-mode fallback waits for: those that weigh most."
    ),
]
MoeProfile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What meswitch moe profile wrote: the MoE experts that --moe-mode virtual begins with, and how many each"
        " layer has (default: as many in each).",
        show_default=False,
    ),
]
MoeSwapRate = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="What --moe-mode virtual reads a second at most, to follow what is asked; 0: nothing (default: 64MiB).",
        show_default=False,
    ),
]
MoeTrace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="With --moe-budget: write down which MoE experts are needed, read and evicted, for `meswitch moe timeline`"
        " (default: no trace).",
        show_default=False,
    ),
]


def generate(
    base: Base,
    prompts: Prompts,
    experts: ExpertsFolder = None,
    expert: ExpertName = None,
    router: RouterFolder = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    stop: Stop = None,
    device: DeviceName = "cpu",
    kernels: KernelsName = "auto",
    host_budget: HostBudget = None,
    device_budget: DeviceBudget = None,
    moe_budget: MoeBudget = None,
    moe_mode: MoeMode = "exact",
    moe_copies: MoeCopies = None,
    moe_fetched: MoeFetched = 1,
    moe_profile: MoeProfile = None,
    moe_swap_rate: MoeSwapRate = None,
    moe_trace: MoeTrace = None,
    allow_quantized_base: AllowQuantizedBase = False,
    as_json: Json = False,
) -> None:
    """Answer prompts with an expert or the base.

    With --router and no --expert the router chooses. Several prompts run as one batch.

    \b
      meswitch generate base/ --experts experts/ --expert math "What is 17 * 23?"
      meswitch generate base/ --experts experts/ --router router/ "What is 17 * 23?" "def quicksort(" --json
      meswitch generate moe/ --moe-budget 8GiB --moe-mode virtual --moe-profile math.json "What is 17 * 23?"
    """
    if expert == "auto" and router is None:
        raise typer.BadParameter("auto needs --router", param_hint="--expert")
    if moe_trace is not None and moe_budget is None:
        raise typer.BadParameter("it needs --moe-budget", param_hint="--moe-trace")
    if experts is not None and not experts.is_dir():  # said before the base is loaded
        raise FileNotFoundError(f"expected a folder of delta directories, found none: {experts}")
    texts = [_read_prompt(prompt) for prompt in prompts]
    from meswitch.engine import Engine
    from meswitch.engine.offloaded import MODES, parse_rate
    from meswitch.kernels.select import BACKENDS
    from meswitch.sizes import parse_bytes

    check_choice("--kernels", kernels, BACKENDS)
    check_choice("--moe-mode", moe_mode, MODES)
    with usage_errors():
        budget = parse_bytes(host_budget, "--host-budget")
        on_device = parse_bytes(device_budget, "--device-budget")
        for_moe_experts = parse_bytes(moe_budget, "--moe-budget")
        swap_rate = parse_rate(moe_swap_rate, "--moe-swap-rate")
    optional = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "stop": stop or None}
    sampling = {name: value for name, value in optional.items() if value is not None}
    with quiet_transformers(), show_status("loading the base"):
        engine = Engine(
            base,
            experts=experts,
            router=router,
            device=device,
            kernels=kernels,
            host_budget=budget,
            device_budget=on_device,
            moe_budget=for_moe_experts,
            moe_mode=moe_mode,
            moe_copies=moe_copies,
            moe_fetched=moe_fetched,
            moe_profile=moe_profile,
            moe_swap_rate=swap_rate,
            moe_trace=moe_trace,
            allow_quantized_base=allow_quantized_base,
        )
    with quiet_transformers(), engine:
        if len(texts) == 1 and not as_json:
            _print_stream(engine.stream(texts[0], expert, **sampling))
            return
        with show_status("generating"):
            answers = engine.generate(texts, expert, **sampling)
    _print_answers(texts, answers, as_json=as_json)


def _read_prompt(prompt: str) -> str:
    """The prompt, or what stdin holds in place of `-`. Raises `DataError` for bytes that are no text."""
    where = "on stdin" if prompt == "-" else "as a prompt"
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()  # Python hands over bytes that it cannot decode as lone surrogates
    except UnicodeError as error:
        raise DataError(f"expected UTF-8 text {where}, found bytes that are not") from error
    return text


def _print_stream(stream: Any) -> None:
    for piece in stream:
        write_text(piece)
    write_text("\n")
    answer = stream.answer
    if answer is not None:
        typer.echo(f"[{answer.expert}, {answer.finish_reason}]", err=True)


def _print_answers(prompts: list[str], answers: list[Any], *, as_json: bool) -> None:
    pairs = list(zip(prompts, answers, strict=True))
    if as_json:
        print_json([_answer_to_json(prompt, answer) for prompt, answer in pairs])
        return
    for prompt, answer in pairs:
        write_text(f"> {prompt}\n[{answer.expert}] {answer.text}\n\n")


def _answer_to_json(prompt: str, answer: Any) -> dict[str, Any]:
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
