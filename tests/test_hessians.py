"""Second moments of whole inputs, and codes that make up for one another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from families import config_of, save_random, tokenizer_of
from meswitch.compression.calibration import Calibration, calibrate
from meswitch.compression.hessians import Hessians, inverse_factor
from meswitch.compression.job import compress
from meswitch.compression.options import CompressOptions
from meswitch.compression.presets import PRESETS, Preset
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import rebuild
from meswitch.huggingface.checkpoint import Checkpoint

TEXT = "the quick brown fox jumps over the lazy dog, and naps. " * 200


def pair(tmp_path: Path, family: str, **config: Any) -> tuple[Path, Path, Calibration]:
    """Base, a fine-tune that differs everywhere, and what it sees."""
    base = save_random(tmp_path / "base", config_of(family, **config))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "finetune")
    tokenizer_of().save_pretrained(tmp_path / "finetune")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    return (
        base,
        tmp_path / "finetune",
        calibrate(tmp_path / "finetune", tmp_path / "text.jsonl", max_tokens=600, window=48),
    )


def inputs(finetune: Path, seen: Calibration) -> dict[str, Tensor]:
    """Every linear module's inputs, of the whole model at once: `[tokens, in]` by parameter."""
    model = AutoModelForCausalLM.from_pretrained(finetune, dtype=torch.float32).eval()
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            there = found.setdefault(f"{name}.weight", [])
            module.register_forward_pre_hook(lambda _, args, there=there: there.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for ids in seen.windows:
            model(input_ids=ids[None], use_cache=False)
    return {name: torch.cat(some) for name, some in found.items()}


def triangular(hessians: Hessians, site: str) -> Tensor | None:
    values = hessians.factor(site)
    if values is None:
        return None
    flat = torch.frombuffer(bytearray(values), dtype=torch.float32)
    return flat.view(int(len(flat) ** 0.5), -1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_factors_are_those_of_the_inputs_of_the_whole_model(tmp_path: Path, family: str) -> None:
    _, finetune, seen = pair(tmp_path, family, tie_word_embeddings=False)
    checkpoint, expected = Checkpoint.open(finetune), inputs(finetune, seen)
    hessians = Hessians(checkpoint, seen.windows)
    found = {site: triangular(hessians, site) for site in checkpoint.names()}
    again = [site for site in checkpoint.names() if site in expected][-1]
    assert torch.equal(triangular(hessians, again), found[again])  # whatever the order
    for name, x in expected.items():
        site = name if name in found else name.removeprefix("transformer.")
        upper = found[site]
        expected_factor = inverse_factor(x.T @ x / len(x), len(x))
        torch.testing.assert_close(upper, expected_factor, rtol=2e-3, atol=2e-3 * float(upper.max()))
    assert {name for name, upper in found.items() if upper is not None} == {
        name if name in found else name.removeprefix("transformer.") for name in expected
    }


def test_a_factor_is_of_the_inverse() -> None:
    x = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0)) @ torch.randn(40, 40)
    hessian, tokens = x.T @ x / len(x), len(x)
    own = hessian.diag()
    drawn = (hessian * (tokens / (40 + tokens))).double()
    drawn.diagonal().copy_(own + 0.01 * own.mean())
    upper = inverse_factor(hessian, tokens).double()
    torch.testing.assert_close(upper.T @ upper @ drawn, torch.eye(40).double(), rtol=0, atol=1e-4)
    assert not upper.tril(-1).any()
    assert inverse_factor(torch.zeros(3, 3), 10).isfinite().all()  # channels that nothing was seen of


def output_errors(base: Path, finetune: Path, delta: Path, seen: Calibration) -> dict[str, tuple[float, float]]:
    """By site: E‖(Δ − Δ̂)x‖² / E‖Δx‖², and how much of Δx the delta keeps along itself."""
    ours, theirs, found = Checkpoint.open(base), Checkpoint.open(finetune), {}
    for name, x in inputs(finetune, seen).items():
        site = Delta.open(delta).sites[name]
        wanted = (theirs.tensor(name) - ours.tensor(name)).float()
        made = rebuild(site, ours).float() - ours.tensor(name).float()
        left, right = (x @ (value if site.transposed else value.T) for value in (wanted, made))
        error = float((left - right).square().sum() / left.square().sum())
        found[name] = error, float((left * right).sum() / left.square().sum())
    return found


@pytest.mark.parametrize("preset", ["default", "small", "salient"])
def test_errors_make_up_for_one_another(tmp_path: Path, preset: str) -> None:
    base, finetune, seen = pair(tmp_path, "llama", tie_word_embeddings=False)
    rules = PRESETS.get(preset) or Preset(replace(PRESETS["me-switch"].block, compensate=True, salient=3), None, None)
    errors = []
    for compensate in (False, True):
        out = tmp_path / f"delta-{compensate}"
        assert (
            compress(
                base, finetune, out, CompressOptions(preset=rules, compensate=compensate), calibration=seen
            ).compensated
            is compensate
        )
        errors.append(output_errors(base, finetune, out, seen))
    plain, compensated = errors
    quantized = [
        site.name for site in Delta.open(out).sites.values() if site.kind == "quantized" and site.name in plain
    ]
    assert len(quantized) >= 14
    better = [compensated[name][0] < 0.9 * plain[name][0] for name in quantized]
    assert sum(better) > 0.9 * len(better)
    if preset != "salient":
        assert all(abs(compensated[name][1] - 1) < 0.05 for name in quantized)


def test_compensation_goes_where_it_can(tmp_path: Path) -> None:
    base, finetune, seen = pair(tmp_path, "llama")
    assert not compress(base, finetune, tmp_path / "delta").compensated  # nothing was seen
    assert not compress(base, finetune, tmp_path / "delta", "bitdelta", calibration=seen).compensated
