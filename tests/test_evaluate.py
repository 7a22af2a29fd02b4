"""The scores of base, fine-tune and expert, against transformers and against restored checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random, tokenizer_of
from meswitch import reference
from meswitch.compression.evaluation import Evaluation, Score, evaluate
from meswitch.compression.job import compress
from meswitch.compression.low_rank import rank_of_equal_bytes, svd_of_equal_bytes
from meswitch.compression.options import CompressOptions
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.errors import (
    ArchitectureError,
    BaseMismatchError,
    CheckpointError,
    DataError,
    FormatError,
    NonFiniteError,
)
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import QuantizedSite

TEXT = "Of man's first disobedience, and the fruit of that forbidden tree. " * 6


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return made(tmp_path_factory.mktemp("trio"), "llama")


def made(folder: Path, architecture: str, *, grow: int = 0, **changes: Any) -> dict[str, Path]:
    base = save_random(folder / "base", config_of(architecture, **changes))
    finetune = save_finetune(folder / "finetune", base, 1, grow=grow, strength=0.1)
    if grow:
        tokenizer = tokenizer_of()
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(finetune)
    compress(base, finetune, folder / "delta", CompressOptions(bits=2))
    (folder / "data.txt").write_text(TEXT)
    return {name: folder / name for name in ("base", "finetune", "delta")} | {"data": folder / "data.txt"}


def nll(folder: Path, text: str, window: int) -> float:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(tokenizer_of()(text)["input_ids"])
    total, tokens = 0.0, 0
    for start in range(0, len(ids), window):
        part = ids[start : start + window][None]
        if part.shape[1] > 1:
            with torch.no_grad():
                total += float(model(input_ids=part, labels=part).loss) * (part.shape[1] - 1)
            tokens += part.shape[1] - 1
    return total / tokens


@pytest.mark.parametrize(
    ("architecture", "grow", "changes"),
    [
        ("llama", 0, {}),
        ("llama", 8, {}),
        ("qwen2", 0, {}),
        ("qwen2", 8, {}),
        ("gpt2", 0, {}),
        ("phi3", 0, {}),
        ("gemma", 0, {}),
        ("gpt_neox", 0, {}),
    ],
)
def test_scores_are_those_of_whole_checkpoints(
    tmp_path: Path, architecture: str, grow: int, changes: dict[str, Any]
) -> None:
    paths = made(tmp_path, architecture, grow=grow, **changes)
    restore(paths["base"], paths["delta"], tmp_path / "restored")
    found = evaluate(*(paths[name] for name in ("base", "delta", "finetune", "data")), window=100)
    assert found.tokens == len(TEXT) - math.ceil(len(TEXT) / 100)
    assert found.base is not None
    for score, folder in ((found.base, "base"), (found.finetune, "finetune"), (found.expert, "restored")):
        assert score.nll == pytest.approx(nll(tmp_path / folder, TEXT, 100), rel=1e-4)


def test_what_is_scored_is_not_rounded_to_the_fine_tunes_dtype(tmp_path: Path) -> None:
    """A delta as small as the steps of bfloat16, which `restore` would round away or double."""
    base = save_random(tmp_path / "base", config_of("llama"))
    finetune = save_finetune(tmp_path / "finetune", base, 1, strength=0.002)
    for folder in (base, finetune):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    compress(base, finetune, tmp_path / "delta")
    delta = Delta.open(tmp_path / "delta")
    (tmp_path / "data.txt").write_text(TEXT)
    found = evaluate(base, delta.path, finetune, tmp_path / "data.txt", window=100)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(reference.served(delta.sites[name], parameter))
    model.save_pretrained(tmp_path / "served")
    restore(base, delta.path, tmp_path / "restored")
    assert found.expert.nll == pytest.approx(nll(tmp_path / "served", TEXT, 100), rel=1e-6)
    assert found.expert.nll != pytest.approx(nll(tmp_path / "restored", TEXT, 100), rel=1e-5)


def test_kl_and_agreement(trio: dict[str, Path], tmp_path: Path) -> None:
    restore(trio["base"], trio["delta"], tmp_path / "restored")
    found = evaluate(trio["base"], trio["delta"], trio["finetune"], trio["data"], window=64)
    ids = torch.tensor(tokenizer_of()(TEXT)["input_ids"])
    windows = [part for part in torch.split(ids, 64) if len(part) > 1]
    logs = []
    for folder in (trio["finetune"], tmp_path / "restored"):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = [model(input_ids=part[None]).logits[0, :-1] for part in windows]
        logs.append(torch.cat(logits).double().log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-3)
    assert found.top1_agreement == pytest.approx(float((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean()))
    assert found.kl > 0 and 0 <= found.top1_agreement <= 1


def test_json_is_the_documented_one(trio: dict[str, Path]) -> None:
    steps: list[tuple[int, int]] = []
    found = evaluate(
        trio["base"], trio["delta"], trio["finetune"], trio["data"], max_tokens=90, window=32,
        progress=lambda at: steps.append((at.done, at.total)),
    )  # fmt: skip
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert list(value) == ["tokens", "base", "finetune", "expert", "recovered_share"]
    assert set(value["base"]) == set(value["finetune"]) == {"nll", "perplexity"}
    assert set(value["expert"]) == {"nll", "perplexity", "kl", "top1_agreement"}
    assert value["tokens"] == 90 - 3
    assert steps[-1] == (270, 270) and steps == sorted(steps)


def test_the_svds_json_is_the_documented_one(trio: dict[str, Path]) -> None:
    steps: list[tuple[int, int]] = []
    given = [trio[name] for name in ("base", "delta", "finetune", "data")]
    found = evaluate(*given, max_tokens=90, svd=True, progress=lambda at: steps.append((at.done, at.total)))
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert list(value) == ["tokens", "base", "finetune", "expert", "recovered_share", "svd"]
    assert list(value["svd"]) == ["nll", "perplexity", "kl", "top1_agreement", "recovered_share", "rank", "bytes"]
    assert value["svd"]["bytes"] <= Delta.open(trio["delta"]).nbytes
    assert steps[-1] == (450, 450) and steps == sorted(steps)
    del value["svd"]
    assert value == evaluate(*given, max_tokens=90).to_json()
    assert found == evaluate(*given, max_tokens=90, svd=True), "the seed is fixed"


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}), ("gpt2", {"n_embd": 64})],
)
def test_a_difference_of_low_rank_is_the_svds(architecture: str, changes: dict[str, Any], tmp_path: Path) -> None:
    paths = made(tmp_path, architecture, **changes)
    model: Any = AutoModelForCausalLM.from_pretrained(paths["base"], dtype=torch.float32)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight += 0.03 * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
    model.save_pretrained(paths["finetune"])
    compress(paths["base"], paths["finetune"], paths["delta"], CompressOptions(bits=1))
    found = evaluate(*(paths[name] for name in ("base", "delta", "finetune", "data")), window=100, svd=True)
    assert found.svd is not None
    assert found.kl > 1e-3 and found.svd.kl < 1e-5 and found.svd.top1_agreement > 0.99


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_svd_weighs_no_more_than_its_site(family: str, tmp_path: Path) -> None:
    paths = made(tmp_path, family, grow=3)
    base, finetune = Checkpoint.open(paths["base"]), Checkpoint.open(paths["finetune"])
    for site in Delta.open(paths["delta"]).sites.values():
        if not isinstance(site, QuantizedSite):
            continue
        rival = svd_of_equal_bytes(site, base, finetune)
        assert site.nbytes - 2 * (site.out_features + site.in_features) < rival.nbytes <= site.nbytes
        wanted = finetune.tensor(site.name)[: len(base.tensor(site.name))] - base.tensor(site.name)
        wanted = wanted.T if site.transposed else wanted
        rank = rank_of_equal_bytes(site)
        missed = float((reference.dense(rival) - wanted).norm() / wanted.norm())
        spectrum = torch.linalg.svdvals(wanted)
        assert missed == pytest.approx(float(spectrum[rank:].norm() / spectrum.norm()), rel=5e-3)
        restored, known = reference.restored(rival, base.tensor(site.name)), len(base.tensor(site.name))
        assert torch.equal(restored[known:], finetune.tensor(site.name)[known:])


def test_an_svd_against_another_shape_is_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    other = save_random(tmp_path / "other", config_of("llama", intermediate_size=40))
    with pytest.raises(ArchitectureError, match="the delta's shape"):
        evaluate(trio["base"], trio["delta"], other, trio["data"], svd=True)


def test_of_a_real_fine_tune_an_svd_of_equal_bytes_keeps_less(family: Any, tmp_path: Path) -> None:
    compress(family.base, family.experts["maths"], tmp_path / "delta", CompressOptions(bits=2))
    given = (family.base, tmp_path / "delta", family.experts["maths"], family.heldout["maths"])
    found = evaluate(*given, max_tokens=600, svd=True)
    assert found.svd is not None and found.svd.rank is not None and found.svd.rank > 4
    assert found.kl < found.svd.kl < 1
    share = found.to_json()["svd"]["recovered_share"]
    assert found.recovered_share is not None and 0 < share < found.recovered_share


@given(st.lists(st.floats(0, 20), min_size=3, max_size=3))
def test_recovered_share(scores: list[float]) -> None:
    base, finetune, expert = scores
    found = Evaluation(1, Score(base), Score(finetune), Score(expert), 0.0, 1.0)
    assert found.gain == base - finetune
    if base - finetune < 1e-6:
        assert found.recovered_share is None, "nothing was gained"
    else:
        assert found.recovered_share == (base - expert) / (base - finetune)
    json.dumps(found.to_json())


@pytest.mark.parametrize("words", [5, 13, 40, 90])
def test_a_fine_tune_that_is_the_base_gained_nothing(trio: dict[str, Path], tmp_path: Path, words: int) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{i * 7 % 61}" for i in range(words)))
    found = evaluate(trio["base"], trio["delta"], trio["base"], tmp_path / "a.txt")
    assert found.base == found.finetune and found.gain == 0.0, "equal models are scored in the same way"
    assert found.recovered_share is None and found.to_json()["recovered_share"] is None


def test_an_infinite_perplexity_is_null() -> None:
    score = Score(1e6)
    assert score.perplexity == math.inf and score.to_json()["perplexity"] is None


def test_tokens_the_base_has_no_row_for_leave_it_unscored(tmp_path: Path) -> None:
    paths = made(tmp_path, "llama", grow=4)
    paths["data"].write_text("known <new> known")
    found = evaluate(paths["base"], paths["delta"], paths["finetune"], paths["data"])
    assert found.base is None and found.recovered_share is None and found.kl >= 0
    assert found.to_json()["base"] == {"nll": None, "perplexity": None}


def test_a_token_no_model_has_is_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama", vocab_size=260))
    compress(base, base, tmp_path / "delta")
    (tmp_path / "a.txt").write_text("fine <assistant> not")
    with pytest.raises(DataError, match="260"):
        evaluate(base, tmp_path / "delta", base, tmp_path / "a.txt")


def test_too_little_text_is_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="two tokens"):
        evaluate(trio["base"], trio["delta"], trio["finetune"], tmp_path / "a.txt")
    for wrong in (1, 0):
        with pytest.raises(ValueError, match="at least 2"):
            evaluate(trio["base"], trio["delta"], trio["finetune"], trio["data"], window=wrong)
        with pytest.raises(ValueError, match="at least 2"):
            evaluate(trio["base"], trio["delta"], trio["finetune"], trio["data"], max_tokens=wrong)


def test_another_base_is_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    other = save_random(tmp_path / "other", config_of("llama"), seed=9)
    with pytest.raises(BaseMismatchError):
        evaluate(other, trio["delta"], trio["finetune"], trio["data"])


def test_another_fine_tune_is_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    other = save_finetune(tmp_path / "other", trio["base"], 3, grow=8)
    with pytest.raises(FormatError, match="vocabulary"):
        evaluate(trio["base"], trio["delta"], other, trio["data"])


def test_a_broken_fine_tune_is_refused(trio: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = save_finetune(tmp_path / "other", trio["base"], 3)
    state = load_file(other / "model.safetensors")
    lost = state.pop("model.layers.0.mlp.up_proj.weight")
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj"):
        evaluate(trio["base"], trio["delta"], other, trio["data"])
    state["model.layers.0.mlp.up_proj.weight"] = lost.fill_(float("nan"))
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="fine-tune"):
        evaluate(trio["base"], trio["delta"], other, trio["data"])


def test_two_bits_keep_most_of_a_real_fine_tune(family: Any, tmp_path: Path) -> None:
    finetune = family.experts["maths"]
    shares, divergences = [], []
    for bits in (1, 2, 4):
        compress(family.base, finetune, tmp_path / str(bits), CompressOptions(bits=bits))
        found = evaluate(family.base, tmp_path / str(bits), finetune, family.heldout["maths"], max_tokens=600)
        assert found.base is not None and found.recovered_share is not None
        assert found.finetune.nll < found.base.nll - 0.05
        shares.append(found.recovered_share)
        divergences.append(found.kl)
    # A share may pass one by chance; the divergence cannot.
    assert divergences == sorted(divergences, reverse=True) and shares[1] > 0.9 and abs(shares[2] - 1) < 0.01
