"""A whole model in a few bits a weight, in the format of deltas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random
from meswitch import CompressOptions, Delta, calibrate, compress, evaluate, evaluate_quantized, quantize, restore
from meswitch.demo.paths import Family
from meswitch.errors import BaseMismatchError, FormatError
from meswitch.experts.pool import ExpertPool
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import QuantizedSite
from test_cli import read, run


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen2"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("models") / request.param, config_of(request.param))


@pytest.mark.parametrize(("bits", "most"), [(2, 0.4), (4, 0.12), (8, 0.01)])
def test_every_matrix_is_near_and_everything_else_exact(model: Path, tmp_path: Path, bits: int, most: float) -> None:
    report = quantize(model, tmp_path / "quantized", CompressOptions(bits=bits))
    delta, source = Delta.open(tmp_path / "quantized"), Checkpoint.open(model)
    delta.verify(source)
    assert delta.kind == delta.inspect()["kind"] == "base" and report.bpw == delta.bpw
    assert set(delta.sites) == set(source.names())
    restore(None, tmp_path / "quantized", tmp_path / "again")
    again = Checkpoint.open(tmp_path / "again")
    for name in source.names():
        one, other = source.tensor(name).float(), again.tensor(name).float()
        assert again.dtype(name) == source.dtype(name)
        if one.dim() < 2:
            assert torch.equal(one, other), name
        else:
            assert (one - other).norm() <= most * one.norm(), name
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=torch.arange(20)[None]).logits
        for path in (model, tmp_path / "again")
    ]
    assert (logits[0] - logits[1]).norm() < 3 * most * logits[0].norm()


def test_a_quantized_model_keeps_what_it_knows(family: Family, tmp_path: Path) -> None:
    text = next(path for path in sorted((Path(family.base).parent / "heldout").iterdir()))
    calibration = calibrate(family.base, text)
    kl = {}
    for name, given in (("plain", None), ("calibrated", calibration)):
        report = quantize(family.base, tmp_path / name, calibration=given)
        assert report.compensated == (given is not None) and 4.0 < report.bpw < 4.3
        found = evaluate_quantized(family.base, tmp_path / name, text, max_tokens=4096)
        kl[name] = found.kl
        assert found.quantized.nll - found.model.nll < 0.05 and found.top1_agreement > 0.85
    assert kl["calibrated"] < kl["plain"] < 0.05


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_target_leaves_no_row_without_codes(model: Path, tmp_path: Path, calibrated: bool) -> None:
    """A row of a delta without codes is the base's; one of a model would be zeros."""
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 4)
    calibration = calibrate(model, tmp_path / "text.txt") if calibrated else None
    smallest = quantize(model, tmp_path / "smallest", CompressOptions(bits=1)).bytes
    options = CompressOptions(target_bytes=smallest + 4000)
    report = quantize(model, tmp_path / "quantized", options, calibration=calibration)
    assert report.bytes <= smallest + 4000 and report.chosen is not None
    assert not any(chosen["form"].startswith("0") for chosen in report.chosen)
    for site in Delta.open(tmp_path / "quantized").outline.values():
        if isinstance(site, QuantizedSite):
            assert sum(part.count for part in site.parts) == site.out_features, site.name


def test_it_is_not_an_expert_and_a_delta_is_not_a_model(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    other = save_finetune(tmp_path / "other", base, seed=1)
    quantize(base, tmp_path / "quantized")
    compress(base, other, tmp_path / "delta")
    text = tmp_path / "text.txt"
    text.write_text("one two three four")
    pool: Any = ExpertPool(None, None)  # type: ignore[arg-type]
    pool._layers = object()
    with pytest.raises(FormatError, match="expected the delta of an expert, found a quantized model"):
        pool.open("a", tmp_path / "quantized")
    with pytest.raises(FormatError, match="expected a delta, found a quantized model"):
        evaluate(base, tmp_path / "quantized", other, text)
    with pytest.raises(FormatError, match="expected a quantized model, found a delta"):
        evaluate_quantized(base, tmp_path / "delta", text)
    with pytest.raises(BaseMismatchError):
        evaluate_quantized(other, tmp_path / "quantized", text)
    with pytest.raises(BaseMismatchError, match="expected the base of a delta, found none"):
        restore(None, tmp_path / "delta", tmp_path / "x")
    with pytest.raises(BaseMismatchError, match="expected no base for a quantized model"):
        restore(base, tmp_path / "quantized", tmp_path / "x")


def test_the_command(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} and {n}"}) + "\n" for n in range(30)))
    made = read("quantize", base, "-o", tmp_path / "small", "--bpw", 6, "--calibrate", tmp_path / "text.jsonl")
    assert made["method"] == "auto" and made["bpw"] <= 6
    assert run("quantize", base, "-o", tmp_path / "four").exit_code == 0
    assert run("verify", tmp_path / "four", "--base", base).exit_code == 0
    assert read("inspect", tmp_path / "four")["kind"] == "base"
    scores = read("evaluate", base, tmp_path / "four", "--data", tmp_path / "text.jsonl")
    assert set(scores) == {"tokens", "model", "quantized"} and scores["quantized"]["kl"] >= 0
    found = run("evaluate", base, tmp_path / "four", "--data", tmp_path / "text.jsonl")
    assert found.exit_code == 0 and "KL(model, quantized)" in found.stdout
    assert run("restore", tmp_path / "four", "-o", tmp_path / "again").exit_code == 0
    compress(base, save_finetune(tmp_path / "tuned", base, seed=1), tmp_path / "delta")
    found = run("evaluate", base, tmp_path / "delta", "--data", tmp_path / "text.jsonl")
    assert found.exit_code == 2 and "--against" in found.stderr
