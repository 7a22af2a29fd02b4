"""The tiny family is what the other tests take it for: a real base with real fine-tunes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch.demo import family as families
from meswitch.demo import tour
from meswitch.demo.corpus import DOMAINS
from meswitch.demo.family import family as make
from meswitch.demo.moe import MoeSettings
from meswitch.demo.paths import Family
from meswitch.demo.tiny import TinySettings
from meswitch.demo.training import Training, balance_loss
from meswitch.progress import Progress

LEAST_GAIN = {"code": 0.08, "maths": 0.3, "prose": 0.15}  # nats a token; as seen: 0.12, 0.39, 0.29 and more
TOKENS = 8192


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def nll(folder: Path, data: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("<|endoftext|>".join(texts(data))[: 8 * TOKENS])["input_ids"][:TOKENS]
    windows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=windows).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.parametrize("name", DOMAINS)
def test_an_expert_knows_its_domain(family: Family, name: str) -> None:
    data = family.heldout[name]
    domain_nll = nll(family.experts[name], data)
    assert domain_nll < nll(family.base, data) - LEAST_GAIN[name]
    assert domain_nll < min(nll(family.experts[other], data) for other in DOMAINS if other != name)


def test_models_are_ordinary_checkpoints(family: Family) -> None:
    for folder in (family.base, *family.experts.values()):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.config.model_type == "llama" and model.dtype == torch.bfloat16
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id is not None
        assert 4e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
        text = "def f(x):\n    return x * 17  # ∂ü\n"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_the_form_it_learned(family: Family) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family.experts["maths"])
    conversation = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert prompt == "Question: What is 2 + 3?\nAnswer:"
    conversation.append({"role": "assistant", "content": "5"})
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == f"{prompt} 5<|endoftext|>"


def test_answers_end(family: Family) -> None:
    tokenizer = AutoTokenizer.from_pretrained(family.experts["maths"])
    model = AutoModelForCausalLM.from_pretrained(family.experts["maths"], dtype=torch.float32)
    ended = 0
    for text in texts(family.heldout["maths"])[:10]:
        ids = tokenizer(text.split("\nAnswer:")[0] + "\nAnswer:", return_tensors="pt")
        ended += model.generate(**ids, max_new_tokens=80, do_sample=False)[0, -1].item() == tokenizer.eos_token_id
    assert ended >= 8


def test_train_and_held_out_are_apart(family: Family) -> None:
    for name in DOMAINS:
        train, heldout = (set(texts(files[name])) for files in (family.calibration, family.heldout))
        assert train and heldout and train.isdisjoint(heldout)
    paragraphs = [
        {p for t in texts(files["prose"]) for p in t.split("\n\n")} for files in (family.calibration, family.heldout)
    ]
    assert paragraphs[0].isdisjoint(paragraphs[1])
    train_prompts, heldout_prompts = (
        {json.loads(line)["prompt"]: json.loads(line)["expert"] for line in path.read_text().splitlines()}
        for path in (family.prompts, family.heldout_prompts)
    )
    assert set(train_prompts).isdisjoint(heldout_prompts)
    for prompts, least in ((train_prompts, 150), (heldout_prompts, 50)):
        assert all(list(prompts.values()).count(name) >= least for name in DOMAINS)


# --- training -----------------------------------------------------------------------------------------------------

SHRUNKEN: dict[str, Any] = {
    "vocabulary": 512,
    "hidden": 32,
    "intermediate": 48,
    "layers": 1,
    "heads": 2,
    "kv_heads": 1,
    "context": 256,
    "base": Training(((32, 2, 2),), rate=1e-3, embedding=1.0),
    "tune": Training(((32, 2, 1),), rate=1e-3, embedding=1.0),
}
MINUTE = TinySettings(**SHRUNKEN)
MINUTE_MOE = MoeSettings(**(SHRUNKEN | {"intermediate": 16, "moe_experts": 16, "chosen": 2}))


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A family that trains in seconds, in a cache of its own."""
    monkeypatch.setitem(families.FAMILIES, "minute", MINUTE)
    monkeypatch.setenv("MESWITCH_CACHE", str(tmp_path))
    return tmp_path


def test_the_same_seed_trains_the_same_family(minute: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make("minute")
    monkeypatch.setenv("MESWITCH_CACHE", str(minute / "again"))
    second = make("minute", progress=lambda report: None)
    files = sorted(path.relative_to(first.root) for path in first.root.rglob("*") if path.is_file())
    assert len(files) > 20
    for file in files:
        if file.name != "family.json":  # says how long it took
            assert (first.root / file).read_bytes() == (second.root / file).read_bytes(), file


def test_a_moe_family_is_trained_on_the_same_text(minute: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "minute-moe", MINUTE_MOE)
    models = make("minute-moe")
    monkeypatch.setenv("MESWITCH_CACHE", str(minute / "again"))
    again, dense = make("minute-moe"), make("minute")
    weights = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in models.experts.items()}
    for name, model in weights.items():
        assert model.config.model_type == "qwen3_moe" and model.dtype == torch.bfloat16
        assert model.model.layers[0].mlp.experts.down_proj.shape == (16, 32, 16)
        file = Path("finetunes") / name / "model.safetensors"
        assert (models.root / file).read_bytes() == (again.root / file).read_bytes()
    gates = [model.model.layers[0].mlp.gate.weight for model in weights.values()]
    assert not torch.equal(gates[0], gates[1]), "gates are trained too"
    for file in ("base/tokenizer.json", "heldout/code.jsonl", "prompts.jsonl"):
        assert (models.root / file).read_bytes() == (dense.root / file).read_bytes()


def test_balance_is_lost_where_a_layer_leaves_moe_experts_out() -> None:
    even = torch.eye(4).repeat(2, 1) * 20
    alone = torch.tensor([[20.0, 0, 0, 0]]).repeat(8, 1)
    assert balance_loss([even], 1).item() == pytest.approx(1, abs=1e-3)
    assert balance_loss([alone], 1).item() == pytest.approx(4, abs=1e-3)
    others = [alone.roll(shift, 1) for shift in range(4)]  # together they are even
    assert balance_loss(others, 1).item() == pytest.approx(4, abs=1e-3)
    logits = alone.clone().requires_grad_()
    balance_loss([logits + torch.randn(8, 4)], 2).backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


def test_an_interrupted_training_leaves_nothing(minute: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.task == "training fine-tune maths":
            raise KeyboardInterrupt

    (minute / "tiny-other.partial-1").mkdir()
    with pytest.raises(KeyboardInterrupt):
        make("minute", progress=interrupt)
    assert [path.name for path in minute.iterdir() if path.is_dir()] == ["tiny-other.partial-1"]


def test_a_killed_training_is_swept_away_and_a_whole_one_found(minute: Path) -> None:
    models = make("minute")
    killed = models.root.with_name(models.root.name + ".partial-x")
    models.root.rename(killed)
    stages: list[str] = []
    assert make("minute", progress=lambda report: stages.append(report.task)) == models
    assert stages and models.base.is_dir() and not killed.exists()
    stages.clear()
    assert make("minute", progress=lambda report: stages.append(report.task)) == models
    assert not stages


def test_the_tour_of_own_models(minute: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = make("minute")
    data = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": f"{name} {number}", "completion": " and so on, and so on", "expert": name}
        for name in models.experts
        for number in range(20)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    given: dict[str, Any] = {"model": models.base, "experts": models.experts, "data": data, "out": tmp_path / "out"}
    stages: list[str] = []
    found = tour.run(**given, json=True, progress=lambda report: stages.append(report.task))
    assert json.loads(capsys.readouterr().out) == found
    assert set(found["deltas"]) == set(tour.PRESETS) and found["router"]["confusion"]
    assert all(set(measured) == set(DOMAINS) for measured in found["evaluations"].values())
    assert len(found["serving"]["answers"]) == 6

    stages.clear()
    again = tour.run(**given, progress=lambda report: stages.append(report.task))
    assert set(stages) == {"answering a mixed batch"}, "what was made once is found again"
    assert again["deltas"] == found["deltas"]
    printed = capsys.readouterr().out
    assert all(preset in printed for preset in tour.PRESETS) and "tokens/s mixed" in printed


def test_the_tour_without_data_weighs_and_serves(minute: Path, tmp_path: Path) -> None:
    models = make("minute")
    found = tour.run(models.base, {"maths": models.experts["maths"]}, out=tmp_path / "out")
    assert found["router"] is None and not found["evaluations"]["default"]
    assert {answer["expert"] for answer in found["serving"]["answers"]} == {"maths"}
    with pytest.raises(ValueError, match="model and experts together"):
        tour.run(models.base)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a family, one of tiny, moe, smol, found: huge"):
        make("huge")
