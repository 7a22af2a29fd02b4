"""The `meswitch` command: what it prints where, and with what exit code it ends."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from families import config_of, save_finetune, save_random, tokenizer_of
from meswitch.cli import guard
from meswitch.errors import ExpertNotFoundError
from meswitch.progress import Progress
from meswitch.router.route import Route
from meswitch.terminal import progress as terminal_progress
from meswitch.terminal.progress import progress_lines, show_progress
from meswitch.terminal.tables import format_size, write_text
from test_adapter import save_adapter

COMMANDS = (
    "compress",
    "import",
    "quantize",
    "inspect",
    "verify",
    "restore",
    "evaluate",
    "generate",
    "replay",
    "demo",
    "doctor",
    "router",
    "moe",
)


def run(*args: object, stdin: str = "", stdout: io.StringIO | None = None) -> Any:
    """The command in this process, through its outermost guard: `exit_code`, `stdout`, `stderr`, `output`."""
    out, err, streams = stdout or io.StringIO(), io.StringIO(), (sys.stdin, sys.stdout, sys.stderr)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(stdin), out, err
    try:
        code = guard.run([str(arg) for arg in args])
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    said = (out.getvalue(), err.getvalue())
    return SimpleNamespace(exit_code=code, stdout=said[0], stderr=said[1], output="".join(said))


def read(*args: object) -> Any:
    """The JSON of a command that went well, which must be all there is on stdout."""
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cli")
    save_random(folder / "base", config_of("llama"))
    save_finetune(folder / "finetune", folder / "base", 1, strength=0.1)
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 4)
    made = run("compress", folder / "base", folder / "finetune", "-o", folder / "delta")
    assert made.exit_code == 0, made.output
    rows = [
        row
        for i in range(8)
        for row in (
            {"prompt": f"def f{i}(x): return x[{i}]", "expert": "code"},
            {"prompt": f"{i} + {i * 7} =", "expert": "base"},
        )
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: folder / name for name in ("base", "finetune", "delta", "text.txt", "prompts.jsonl")}


# --- help and usage -----------------------------------------------------------------------------------------------


def test_help_and_version_are_quick() -> None:
    code = (
        "import sys\n"
        "from meswitch.cli import guard\n"
        "assert guard.run(['--help']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_help_teaches() -> None:
    top = run("--help")
    assert top.exit_code == 0 and all(name in top.stdout for name in COMMANDS)
    for name in (*(name for name in COMMANDS if name != "router"), "router train", "router evaluate"):
        found = run(*name.split(), "--help")
        assert found.exit_code == 0 and f"meswitch {name}" in found.stdout, name
        assert "Usage" in found.stdout
        assert run(*name.split(), "-h").stdout == found.stdout


def test_version() -> None:
    found = run("--version")
    assert found.exit_code == 0 and found.stdout.startswith("meswitch ")


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["compress"],
        ["compress", "base", "finetune"],
        ["compress", "base", "finetune", "-o", "x", "--preset", "huge"],
        ["compress", "base", "finetune", "-o", "x", "--bits", "5"],
        ["compress", "base", "finetune", "-o", "x", "--bits", "two"],
        ["compress", "base", "finetune", "-o", "x", "--embedding-bits", "7"],
        ["compress", "base", "finetune", "-o", "x", "--distill"],
        ["compress", "base", "finetune", "-o", "x", "--calibrate", "y", "--distill", "--distill-method", "half"],
        ["import", "base", "-o", "x"],
        ["import", "base", "adapter"],
        ["compress", "base", "finetune", "-o", "x", "--method", "magic"],
        ["compress", "base", "finetune", "-o", "x", "--bpw", "2", "--target-size", "1GB"],
        ["compress", "base", "finetune", "-o", "x", "--target-size", "2 furlongs"],
        ["compress", "base", "finetune", "-o", "x", "--bpw", "0"],
        ["compress", "base", "finetune", "-o", "x", "--bpw", "nan"],
        ["compress", "base", "finetune", "-o", "x", "--bpw", "2", "--bits", "1"],
        ["inspect"],
        ["inspect", "a", "b"],
        ["verify"],
        ["verify", "a", "--nope"],
        ["restore", "base", "delta"],
        ["evaluate", "base", "delta"],
        ["evaluate", "base", "delta", "--against", "x", "--data", "y", "--window", "1"],
        ["evaluate", "base", "delta", "--data", "y", "--baseline", "x"],
        ["evaluate", "base", "delta", "--data", "y", "--svd"],
        ["quantize", "base"],
        ["quantize", "base", "-o", "x", "--bits", "5"],
        ["quantize", "base", "-o", "x", "--bits", "4", "--bpw", "3"],
        ["restore", "a", "b", "c", "-o", "x"],
        ["generate", "base"],
        ["generate", "base", "hi", "--expert", "auto"],
        ["generate", "base", "hi", "--max-new-tokens", "0"],
        ["generate", "base", "hi", "--temperature", "-1"],
        ["generate", "base", "hi", "--kernels", "abacus"],
        ["generate", "base", "hi", "--host-budget", "much"],
        ["generate", "base", "hi", "--device-budget", "much"],
        ["generate", "base", "hi", "--moe-budget", "much"],
        ["generate", "base", "hi", "--moe-mode", "all"],
        ["generate", "base", "hi", "--moe-fetched", "0"],
        ["generate", "base", "hi", "--moe-swap-rate", "fast"],
        ["generate", "base", "hi", "--moe-trace", "trace.jsonl"],
        ["moe"],
        ["moe", "plan"],
        ["moe", "plan", "model", "--budget", "much"],
        ["moe", "profile", "model", "-o", "x.json"],
        ["moe", "profile", "model", "--data", "x.txt", "-o", "x.json", "--moe-budget", "much"],
        ["moe", "compress", "model", "-o", "x"],
        ["moe", "compress", "model", "--budget", "1GB"],
        ["router"],
        ["router", "train", "base", "-o", "x"],
        ["router", "train", "base", "-o", "x", "--data", "y", "--kind", "oracle"],
        ["router", "train", "base", "-o", "x", "--data", "y", "--threshold", "2"],
        ["demo", "--model", "base"],
        ["demo", "--experts", "a=b"],
        ["demo", "--model", "base", "--experts", "nofolder"],
        ["demo", "--family", "nobody"],
        ["demo", "--data", "x.jsonl"],
    ],
)
def test_wrong_usage_is_2(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(*args)
    assert found.exit_code == 2, found.output
    assert "Usage" in found.stderr or "Usage" in found.stdout
    assert not list(tmp_path.iterdir())


# --- deltas -------------------------------------------------------------------------------------------------------


def test_compress_reports(paths: dict[str, Path], tmp_path: Path) -> None:
    given = ["compress", paths["base"], paths["finetune"], "-o", tmp_path / "delta", "--bits", "1"]
    found = read(*given, "--calibrate", paths["text.txt"])
    assert {"preset", "bytes", "bpw", "seconds", "weights_per_second", "peak_rss_bytes"} <= set(found)
    assert found["method"] == "preset" and found["chosen"] is None
    assert found["preset"] == "default" and found["bytes"] > 0 and 1 < found["bpw"] < 16
    shown = run(*given, "--preset", "small")
    assert shown.exit_code == 0 and "bits a weight" in shown.stdout and "compressing: 100%" in shown.stderr


def test_compress_goes_on(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["compress", paths["base"], paths["finetune"], "-o", tmp_path / "delta", "--calibrate", paths["text.txt"]]

    def interrupt(progress: Progress) -> None:
        if progress.task == "compressing" and progress.done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("meswitch.terminal.progress.progress_lines", lambda: interrupt)
        assert run(*given).exit_code == 130
    found = run(*given)
    assert found.exit_code == 0 and found.stderr.count("going on from an interrupted run, which did ") == 1
    assert "going on" not in run(*given).stderr


def test_compress_warns_of_changed_settings(paths: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(paths["base"], tmp_path / "changed")
    config = json.loads((tmp_path / "changed/config.json").read_text())
    (tmp_path / "changed/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    found = run("compress", paths["base"], tmp_path / "changed", "-o", tmp_path / "delta", "--json")
    assert "warning: the fine-tune computes with another rms_norm_eps: 0.5, base 1e-06\nhint: " in found.stderr
    assert json.loads(found.stdout)["config_changes"] == {"rms_norm_eps": [1e-06, 0.5]}


def test_compress_meets_a_target(paths: dict[str, Path], tmp_path: Path) -> None:
    given = ["compress", paths["base"], paths["finetune"], "-o", tmp_path / "delta"]
    found = read(*given, "--target-size", "60kB", "--calibrate", paths["text.txt"])
    assert found["method"] == "auto" and found["bytes"] <= 60_000 and found["predicted_kl"] > 0
    assert sum(row["sites"] for row in found["chosen"]) > 10
    shown = run(*given, "--bpw", "9")
    assert shown.exit_code == 0 and "no --calibrate" in shown.stderr and "of the predicted loss" in shown.stderr
    small = run(*given, "--target-size", "1kB")
    assert small.exit_code == 1 and "BudgetError: expected a target of at least" in small.stderr


def test_compress_distills(paths: dict[str, Path], tmp_path: Path) -> None:
    given = ["compress", paths["base"], paths["finetune"], "-o", tmp_path / "delta", "--calibrate", paths["text.txt"]]
    for options, method in ((("--distill-method", "blocks"), "blocks"), ((), "whole")):
        found = read(*given, "--distill", *options)["distilled"]
        assert found["method"] == method and 0 <= found["kl_after"] <= found["kl_before"]
    assert run("verify", tmp_path / "delta", "--base", paths["base"]).exit_code == 0


def test_inspect_shows_every_site(paths: dict[str, Path]) -> None:
    found = read("inspect", paths["delta"])
    wanted = {"format_version", "base_fingerprint", "parameters", "bytes", "bpw", "kinds", "sites"}
    assert wanted <= set(found)
    assert set(found["sites"][0]) == {"name", "kind", "shape", "bits", "bpw", "bytes", "relative_error"}
    assert found["parameters"] == sum(kind["parameters"] for kind in found["kinds"].values())
    shown = run("inspect", paths["delta"])
    assert shown.exit_code == 0 and shown.stderr == ""
    for site in found["sites"]:
        assert site["name"] in shown.stdout
    assert "16-bit copies" in shown.stdout


def test_verify_says_sound_or_names_the_error(paths: dict[str, Path], tmp_path: Path) -> None:
    assert run("verify", paths["delta"]).exit_code == 0
    assert run("verify", paths["delta"], "--base", paths["base"]).exit_code == 0
    other = run("verify", paths["delta"], "--base", paths["finetune"])
    assert other.exit_code == 1 and other.stderr.startswith("BaseMismatchError: ") and "hint: " in other.stderr
    harmed = tmp_path / "harmed"
    harmed.mkdir()
    for file in paths["delta"].iterdir():
        (harmed / file.name).write_bytes(file.read_bytes())
    content = bytearray((harmed / "delta.safetensors").read_bytes())
    content[-1] ^= 1
    (harmed / "delta.safetensors").write_bytes(content)
    found = run("verify", harmed)
    assert found.exit_code == 1 and found.stderr.startswith("ChecksumError: ") and found.stdout == ""
    assert "Traceback" not in found.stderr


def test_errors_are_a_message_and_1(paths: dict[str, Path], tmp_path: Path) -> None:
    for args in (
        ["inspect", tmp_path / "nowhere"],
        ["verify", tmp_path / "nowhere"],
        ["compress", tmp_path / "nowhere", paths["finetune"], "-o", tmp_path / "x"],
        ["restore", paths["base"], tmp_path / "nowhere", "-o", tmp_path / "x"],
        ["evaluate", paths["base"], paths["delta"], "--against", tmp_path / "no", "--data", paths["text.txt"]],
        ["router", "evaluate", paths["base"], tmp_path / "nowhere", "--data", paths["prompts.jsonl"]],
        ["generate", paths["base"], "--experts", tmp_path / "nowhere", "hi"],
    ):
        found = run(*args)
        assert found.exit_code == 1, args
        assert found.stdout == "" and "Error: " in found.stderr and "Traceback" not in found.stderr, args
    assert not (tmp_path / "x").exists()


def test_restore_writes_a_checkpoint(paths: dict[str, Path], tmp_path: Path) -> None:
    found = run("restore", paths["base"], paths["delta"], "-o", tmp_path / "merged")
    assert found.exit_code == 0 and found.stdout.strip() == str(tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_evaluate_measures(paths: dict[str, Path]) -> None:
    given = ["evaluate", paths["base"], paths["delta"], "--against", paths["finetune"], "--data", paths["text.txt"]]
    found = read(*given, "--max-tokens", "60")
    assert found["tokens"] == 59 and set(found["expert"]) == {"nll", "perplexity", "kl", "top1_agreement"}
    shown = run(*given)
    assert shown.exit_code == 0 and "recovered share" in shown.stdout and "evaluating: 100%" in shown.stderr
    assert "svd" not in found and "SVD" not in shown.stdout
    rival = read(*given, "--max-tokens", "60", "--svd")
    assert set(rival) - set(found) == {"svd"} and rival["svd"]["rank"] > 0
    assert "SVD of rank" in run(*given, "--svd").stdout


def test_evaluate_against_the_base_itself_says_so(paths: dict[str, Path]) -> None:
    given = ["evaluate", paths["base"], paths["delta"], "--against", paths["base"], "--data", paths["text.txt"]]
    found = run(*given, "--max-tokens", "60")
    assert found.exit_code == 0 and "recovered share -" in found.stdout
    assert "no better than the base\nhint: " in found.stderr


def test_import_reports(paths: dict[str, Path], tmp_path: Path) -> None:
    adapter = save_adapter(paths["base"], tmp_path / "adapter", r=4, target_modules=["q_proj"])
    found = read("import", paths["base"], adapter, "-o", tmp_path / "delta")
    assert set(found) == {"bytes", "bpw", "seconds", "low_rank", "replaced", "shared"}
    shown = run("import", paths["base"], adapter, "-o", tmp_path / "delta")
    assert shown.exit_code == 0 and "2 low-rank sites" in shown.stdout and "importing: 100%" in shown.stderr
    assert read("inspect", tmp_path / "delta")["kinds"]["low_rank"]["sites"] == 2
    refused = run("import", paths["base"], paths["finetune"], "-o", tmp_path / "other")
    assert refused.exit_code == 1 and "adapter_config.json" in refused.stderr and not (tmp_path / "other").exists()


def test_an_interrupt_is_130(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meswitch.compression.job.compress", interrupted)
    found = run("compress", paths["base"], paths["finetune"], "-o", tmp_path / "x")
    assert found.exit_code == 130 and "interrupted" in found.stderr and not (tmp_path / "x").exists()


# --- generate -----------------------------------------------------------------------------------------------------


class Stub:
    """Stands in for the engine: what matters here is what the command asks and prints."""

    asked: list[Any]
    settings: dict[str, Any]

    def __init__(self, base: str, experts: Any = None, router: Any = None, **settings: Any) -> None:
        type(self).asked = [(base, experts, router)]
        type(self).settings = settings

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        type(self).asked.append("closed")

    def answer(self, prompt: str, expert: str | None) -> Any:
        if expert == "nobody":
            raise ExpertNotFoundError("unknown expert: 'nobody'", hint="there are 'math'")
        route = Route("math", {"math": 0.9, "base": 0.1}, False) if expert == "auto" else None
        return SimpleNamespace(
            text=f"{prompt}, said {expert}\u2713", token_ids=[1, 2], expert="math", route=route, finish_reason="stop"
        )

    def generate(self, prompts: list[str], expert: str | None, **options: Any) -> list[Any]:
        type(self).asked.append(options)
        return [self.answer(prompt, expert) for prompt in prompts]

    def stream(self, prompt: str, expert: str | None, **options: Any) -> Any:
        type(self).asked.append(options)
        answer = self.answer(prompt, expert)

        class Pieces:
            def __iter__(self) -> Iterator[str]:
                yield from answer.text

        pieces: Any = Pieces()
        pieces.answer = answer
        return pieces


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    monkeypatch.setattr("meswitch.engine.Engine", Stub)
    return Stub


def test_one_prompt_streams_its_text_alone(stub: type[Stub], tmp_path: Path) -> None:
    found = run("generate", "base", "--experts", tmp_path, "--expert", "math", "hi", "--seed", "3", "--stop", "x")
    assert found.exit_code == 0 and found.stdout == "hi, said math\u2713\n" and "math" in found.stderr
    assert stub.asked == [("base", tmp_path, None), {"seed": 3, "stop": ["x"]}, "closed"]


def test_several_prompts_name_their_expert(stub: type[Stub]) -> None:
    found = run("generate", "base", "one", "-", "--expert", "base", "--temperature", "0.5", stdin="two")
    assert found.exit_code == 0
    assert "> one\n[math] one, said base" in found.stdout and "> two\n[math] two, said base" in found.stdout
    assert stub.asked[1] == {"temperature": 0.5}


@pytest.mark.parametrize("kernels", ["auto", "cpu", "torch"])
def test_generate_passes_settings_on(stub: type[Stub], kernels: str) -> None:
    asked = ["generate", "base", "hi", "--kernels", kernels, "--host-budget", "2KiB", "--moe-budget", "3KiB"]
    usual = {"moe_mode": "exact", "moe_copies": None, "moe_fetched": 1, "moe_profile": None, "moe_swap_rate": None}
    usual |= {"moe_trace": None, "device": "cpu", "device_budget": None}
    usual |= {"kernels": kernels, "host_budget": 2048, "moe_budget": 3072, "allow_quantized_base": False}
    virtual = ["--moe-mode", "virtual", "--moe-profile", "p.json", "--moe-swap-rate"]
    asks = {"moe_mode": "virtual", "moe_profile": Path("p.json")}
    fallback = ["--moe-mode", "fallback", "--moe-copies", "copies", "--moe-fetched", "2"]
    for flags, settings in (
        ([], {}),
        (["--allow-quantized-base"], {"allow_quantized_base": True}),
        ([*virtual, "1MiB"], {**asks, "moe_swap_rate": 2**20}),
        ([*virtual, "0"], {**asks, "moe_swap_rate": 0}),
        (["--device", "cuda:1", "--device-budget", "1KiB"], {"device": "cuda:1", "device_budget": 1024}),
        (["--moe-trace", "t.jsonl"], {"moe_trace": Path("t.jsonl")}),
        (fallback, {"moe_mode": "fallback", "moe_copies": Path("copies"), "moe_fetched": 2}),
    ):
        assert run(*asked, *flags).exit_code == 0
        assert stub.settings == {**usual, **settings}


def test_generate_json(stub: type[Stub], tmp_path: Path) -> None:
    [found] = read("generate", "base", "hi", "--expert", "auto", "--router", tmp_path)
    assert found["expert"] == "math" and found["text"] == "hi, said auto\u2713" and found["token_ids"] == [1, 2]
    assert found["route"] == {"expert": "math", "scores": {"math": 0.9, "base": 0.1}, "abstained": False}


@pytest.mark.parametrize(("prompt", "stdin", "where"), [("caf\udce9", "", "as a prompt"), ("-", "\udce9", "on stdin")])
def test_a_prompt_that_is_not_utf_8_is_refused(stub: type[Stub], prompt: str, stdin: str, where: str) -> None:
    stub.asked = []
    found = run("generate", "base", "fine", prompt, stdin=stdin)
    assert (
        found.exit_code == 1 and found.stderr == f"DataError: expected UTF-8 text {where}, found bytes that are not\n"
    )
    assert not stub.asked, "nothing was loaded for it"


def test_an_unknown_expert_is_1(stub: type[Stub]) -> None:
    found = run("generate", "base", "hi", "--expert", "nobody")
    assert found.exit_code == 1 and found.stdout == "" and stub.asked[-1] == "closed"
    assert found.stderr.startswith("ExpertNotFoundError: unknown expert: 'nobody'\nhint: ")


def test_generate_runs_the_engine(paths: dict[str, Path]) -> None:
    given = ["--experts", paths["delta"], "--expert", "delta", "--max-new-tokens", "4"]
    [found] = read("generate", paths["base"], "hi", *given)
    assert found["expert"] == "delta" and 1 <= len(found["token_ids"]) <= 4
    streamed = run("generate", paths["base"], "hi", *given)
    assert streamed.exit_code == 0 and streamed.stdout == found["text"] + "\n"


# --- routers, demo, doctor ----------------------------------------------------------------------------------------


def test_router_train_and_evaluate(paths: dict[str, Path], tmp_path: Path) -> None:
    trained = run("router", "train", paths["base"], "-o", tmp_path / "r", "--data", paths["prompts.jsonl"])
    assert trained.exit_code == 0 and "base, code" in trained.stdout, trained.output
    given = ["router", "evaluate", paths["base"], tmp_path / "r", "--data", paths["prompts.jsonl"]]
    found = read(*given)
    assert set(found) == {
        *("accuracy", "abstained", "expected_calibration_error", "per_expert", "confusion", "misrouted")
    }
    shown = run(*given)
    assert shown.exit_code == 0 and "accuracy" in shown.stdout
    made = read(
        "router", "train", paths["base"], "-o", tmp_path / "r", "--data", paths["prompts.jsonl"], "--threshold", "0.9"
    )
    assert made["experts"] == ["base", "code"] and made["threshold"] == 0.9


def test_misrouted_prompts_are_listed(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [
        {"prompt": f"p{i}\n" * 60, "expert": "a", "sent": "b", "score": 0.6, "abstained": False} for i in range(12)
    ]
    row = {"prompts": 12, "recall": 0.0, "precision": None, "abstained": 0.0}
    result = {"accuracy": 0.0, "abstained": 0.0, "expected_calibration_error": 0.6, "confusion": {}}
    result |= {"per_expert": {"a": row}, "misrouted": wrong}
    monkeypatch.setattr("meswitch.router.routers.evaluate_router", lambda *_, **__: result)
    found = run("router", "evaluate", "base", tmp_path, "--data", "x.jsonl")
    assert found.stdout.count("a sent to b") == 10 and "2 more" in found.stdout


def test_the_prompt_router_is_refused_clearly(paths: dict[str, Path], tmp_path: Path) -> None:
    found = run(
        "router", "train", paths["base"], "-o", tmp_path / "r", "--data", paths["prompts.jsonl"], "--kind", "prompt"
    )
    assert found.exit_code == 1 and "embedding" in found.stderr and "this version" in found.stderr


def test_the_tour_gets_what_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("meswitch.demo.tour.run", lambda *args, **options: asked.append((args, options)))
    assert run("demo").exit_code == 0
    own = run(
        "demo", "--model", "b", "--experts", "x=a/x", "--experts", "y=a=y", "--data", "d.jsonl", "-o", "out", "--json"
    )
    assert own.exit_code == 0
    assert asked == [
        ((None, None), {"family": "tiny", "data": None, "out": None, "json": False}),
        (
            ("b", {"x": "a/x", "y": "a=y"}),
            {"family": "tiny", "data": Path("d.jsonl"), "out": Path("out"), "json": True},
        ),
    ]


def test_the_tour_takes_names_that_experts_can_have(paths: dict[str, Path], tmp_path: Path) -> None:
    given = ["demo", "--model", paths["base"], "--experts", f"../x={paths['finetune']}", "-o", tmp_path / "out"]
    found = run(*given)
    assert found.exit_code == 1 and found.stderr.splitlines()[-2].startswith("ExpertNameError: ")
    assert not list(tmp_path.iterdir())


def test_doctor_says_what_is_here() -> None:
    found = read("doctor")
    assert found["version"]["torch"] != "not installed" and found["problems"] == []
    assert found["cpu"]["count"] >= 1 and found["torch"]["threads"] >= 1 and found["torch"]["cuda"] in (True, False)
    assert found["cuda"]["kernels"] and found["cuda"]["driver"] and isinstance(found["cuda"]["devices"], list)
    shown = run("doctor")
    assert shown.exit_code == 0 and "cpu backend" in shown.stdout and "cuda driver" in shown.stdout


def test_doctor_survives_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import meswitch

    monkeypatch.delattr(meswitch, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "meswitch._native", None)
    found = run("doctor")
    assert found.exit_code == 1 and "_native" in found.stdout


# --- printing -----------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress_lines(every=0.0)
    show(Progress("working", 1, 1000))
    assert capsys.readouterr().err == "working: 0%\n"  # too little done to say how long the rest takes
    show(Progress("working", 1, 4))
    show(Progress("working", 4, 4))
    progress_lines(every=60.0)(Progress("quiet", 1, 4))
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[0].startswith("working: 25%, ") and "left" in said.err
    assert said.err.splitlines()[1].startswith("working: 100%, ") and "quiet" not in said.err


def test_silent_work_still_prints_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal_progress, "progress_lines", lambda: progress_lines(every=0.02))
    monkeypatch.setattr(terminal_progress, "_SECONDS_BETWEEN_REPEATS", 0.01)
    with show_progress(first="loading") as show:
        time.sleep(0.3)
        show(Progress("working", 0, 2))
        show(Progress("working", 2, 2))
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("loading: 0%") > 1 and lines.count("working: 100%, 0 s") == 1
    assert lines.count("working: 100%, 0 s, finishing") > 1
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "the display is over"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2.5e6, "2.5 MB"), (3.67e9, "3.67 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert format_size(count) == text


def test_a_narrow_encoding_loses_a_letter_not_the_answer(
    stub: type[Stub], paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow:
        encoding = "ascii"

        def __init__(self) -> None:
            self.said = ""

        def write(self, text: str) -> None:
            self.said += text.encode("ascii").decode()

        def flush(self) -> None: ...

    narrow = Narrow()
    monkeypatch.setattr(sys, "stdout", narrow)
    write_text("2 \u2713\n")
    assert narrow.said == "2 ?\n"


def test_messages_data_goes_through_the_template(paths: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert tokenizer_of().chat_template is None
    found = run("evaluate", paths["base"], paths["delta"], "--against", paths["finetune"], "--data", path)
    assert found.exit_code == 1 and found.stderr.startswith("DataError: ") and f"{path}:1" in found.stderr


def test_upgrade_takes_each_directory_by_itself(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden"
    for version in ("v1", "v3", "v4"):
        shutil.copytree(golden / version / "default", tmp_path / version)
    broken = tmp_path / "v1" / "delta.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    before = broken.read_bytes()
    result = run("upgrade", *(tmp_path / version for version in ("v1", "v3", "v4")))
    assert result.exit_code == 1 and "FormatError" in result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["version 3 to 4", "version 4 already"]
    assert broken.read_bytes() == before
    assert run("verify", tmp_path / "v3").exit_code == 0
