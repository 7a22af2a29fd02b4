"""A MoE model within a budget: what its headers promise, and what is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import config_of, save_random
from meswitch import CompressOptions, Delta, Engine, quantize, restore
from meswitch.compression.moe_plan import plan_moe
from meswitch.errors import BudgetError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import ReplacedSite
from test_cli import read, run
from test_moe_statistics import MOE, OTHERS, TEXT

LAYERS = {"deepseek_v3": 1}  # its first layer is dense
PLANNED = {**MOE, "gpt_oss": OTHERS["gpt_oss"]}


def weight_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("family", PLANNED)
def test_sizes_are_those_of_what_is_written(tmp_path: Path, family: str) -> None:
    folder = save_random(tmp_path / "model", config_of(family, **PLANNED[family]))
    plan, checkpoint = plan_moe(folder, 250_000), Checkpoint.open(folder)
    assert (plan.moe_layers, plan.moe_experts, plan.top_k) == (LAYERS.get(family, 2), 6, 2)
    whole = {name: checkpoint.tensor(name).nbytes for name in checkpoint.names()}
    inside = sum(size for name, size in whole.items() if ".experts." in name)
    assert (plan.moe_expert_bytes, plan.trunk_bytes) == (inside, sum(whole.values()) - inside)
    assert plan.layer_bytes == inside // plan.moe_layers
    sizes = {(size.trunk_bits, size.moe_expert_bits): size for size in plan.sizes}
    assert set(sizes) == {(trunk, bits) for trunk in (4, 16) for bits in (1, 2, 3, 4, 8, 16)}
    assert all(size.fits == (size.bytes <= 250_000) for size in plan.sizes)
    quantize(folder, tmp_path / "four", CompressOptions(bits=4))
    assert abs(sizes[4, 4].bytes / weight_of(tmp_path / "four") - 1) < 0.06
    assert plan.possible == (plan.smallest_bytes <= 250_000)
    gates = {name for name, site in Delta.open(tmp_path / "four").sites.items() if isinstance(site, ReplacedSite)}
    assert not any(re.search(r"experts.*proj(\.weight)?$", name) for name in gates)
    read_by_a_token = inside * 2 / 6 + plan.trunk_bytes
    embedding = 0 if checkpoint.is_tied else checkpoint.tensor("model.embed_tokens.weight")[1:].nbytes
    assert sizes[16, 16].bytes_per_token == pytest.approx(read_by_a_token - embedding, abs=1)


def test_a_dense_or_quantized_model_is_refused(tmp_path: Path) -> None:
    dense = save_random(tmp_path / "dense", config_of("llama"))
    for command in (["plan", dense], ["compress", dense, "-o", tmp_path / "x", "--budget", "1MB"]):
        found = run("moe", *command)
        assert found.exit_code == 1 and "found a dense LlamaForCausalLM" in found.stderr
        assert "meswitch quantize" in found.stderr
    quantize(save_random(tmp_path / "model", config_of("mixtral", **MOE["mixtral"])), tmp_path / "four")
    with pytest.raises(UnsupportedModelError, match="found a quantized model"):
        plan_moe(tmp_path / "four")


def test_a_budget_is_kept(tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", config_of("qwen3_moe", **MOE["qwen3_moe"]))
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(BudgetError) as caught:
        quantize(model, tmp_path / "x", CompressOptions(budget_bytes=1000))
    least = int(re.findall(r"[\d,]{5,}", str(caught.value))[0].replace(",", ""))
    assert abs(plan_moe(model).smallest_bytes / least - 1) < 0.1
    for budget in (least + 200, least + 30_000):  # calibrated, settings are longer
        arguments = ["-o", tmp_path / f"{budget}", "--budget", str(budget), "--calibrate", tmp_path / "text.txt"]
        made = read("moe", "compress", model, *arguments)
        assert made["method"] == "auto" and made["compensated"] and made["predicted_kl"] > 0
        assert weight_of(tmp_path / f"{budget}") <= budget
    restore(None, tmp_path / f"{budget}", tmp_path / "again")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    ids = [5, 6, 7, 8]
    tokens = expected.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, 4:]
    with Engine(tmp_path / f"{budget}", exact=True, dtype="float32") as engine:
        assert engine.generate(ids, max_new_tokens=4).token_ids == tokens.tolist()


def test_the_plan_as_text(tmp_path: Path) -> None:
    model = save_random(tmp_path / "model", config_of("olmoe", **MOE["olmoe"]))
    found = run("moe", "plan", model, "--budget", "100kB")
    assert found.exit_code == 0 and "2 layers of 6 MoE experts, 2 a token" in found.stdout
    assert found.stdout.count(" yes") + found.stdout.count(" no ") == 12 and "100.0 kB: possible" in found.stdout
    assert "not possible" in run("moe", "plan", model, "--budget", "10kB").stdout
    made = read("moe", "plan", model)
    assert made["possible"] is None and made["sizes"][0]["fits"] is None
