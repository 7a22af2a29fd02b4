"""MoE checkpoints: every weight of every MoE expert is a site, under its name on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random
from meswitch import reference
from meswitch.compression.calibration import calibrate
from meswitch.compression.evaluation import evaluate
from meswitch.compression.job import compress
from meswitch.compression.options import CompressOptions
from meswitch.compression.presets import PRESETS
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.huggingface.checkpoint import Checkpoint

MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 11, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "head_dim": None,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
INSIDE = {
    "mixtral": {f"block_sparse_moe.experts.{e}.{w}.weight" for e in range(11) for w in ("w1", "w2", "w3")},
    "qwen2_moe": {f"mlp.experts.{e}.{w}_proj.weight" for e in range(4) for w in ("gate", "up", "down")},
    "qwen3_moe": {f"mlp.experts.{e}.{w}_proj.weight" for e in range(4) for w in ("gate", "up", "down")},
}
GATES = {
    "mixtral": {"block_sparse_moe.gate.weight"},
    "qwen2_moe": {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
    "qwen3_moe": {"mlp.gate.weight"},
}


@pytest.fixture(scope="module", params=MOE)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """base, finetune, text.txt, delta (calibrated)"""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_random(folder / "base", config_of(request.param, **MOE[request.param]))
    tuned = save_finetune(folder / "finetune", base, 1)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 20)
    compress(base, tuned, folder / "delta", calibration=calibrate(tuned, folder / "text.txt", max_tokens=256))
    return request.param, folder


def test_every_moe_expert_has_its_sites(made: tuple[str, Path]) -> None:
    family, folder = made
    delta = Delta.open(folder / "delta")
    delta.verify(folder / "base")
    assert set(delta.sites) == set(Checkpoint.open(folder / "finetune").names())
    for layer in ("model.layers.0.", "model.layers.1."):
        kinds = {name.removeprefix(layer): site.kind for name, site in delta.sites.items() if name.startswith(layer)}
        assert kinds.keys() >= INSIDE[family] | GATES[family]
        assert {kinds[name] for name in INSIDE[family]} == {"quantized"}
        assert {kinds[name] for name in GATES[family]} == {"replaced"}
        assert kinds["self_attn.q_proj.weight"] == "quantized"


def test_sites_lie_in_the_order_in_which_they_run(made: tuple[str, Path]) -> None:
    """Layer by layer; within a layer MoE experts by number, each in one piece."""
    _, folder = made
    names = list(Delta.open(folder / "delta").sites)
    inner = [name for name in names if ".experts." in name]
    places = [(int(name.split(".")[2]), int(name.split(".experts.")[1].split(".")[0])) for name in inner]
    assert places == sorted(places)
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers)


def owners(delta: Path) -> dict[str, dict[str, int] | None]:
    return {site["name"]: site.get("owner") for site in Delta.open(delta).manifest["sites"]}


def test_the_manifest_says_which_layer_and_moe_expert_a_site_is_part_of(made: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = made
    found = owners(folder / "delta")
    for name, owner in found.items():
        _, _, inside = name.partition("model.layers.")
        layer, _, leaf = inside.partition(".")
        of_expert = {"moe_expert": int(leaf.split(".experts.")[1].split(".")[0])} if leaf in INSIDE[family] else {}
        assert owner == ({"layer": int(layer), **of_expert} if inside else None), name
    assert sum(owner is None for owner in found.values()) == 3  # embedding, last norm, head
    delta = Delta.open(folder / "delta")
    delta.rewrite(tmp_path / "rewritten", {}, {}, delta.manifest["settings"])
    compress(folder / "base", folder / "finetune", tmp_path / "chosen", CompressOptions(bpw=8.0))
    assert owners(tmp_path / "rewritten") == owners(tmp_path / "chosen") == found


def test_restore_is_each_site_restored(made: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = made
    restore(folder / "base", folder / "delta", tmp_path / "restored")
    found = load_file(tmp_path / "restored" / "model.safetensors")
    base, delta = Checkpoint.open(folder / "base"), Delta.open(folder / "delta")
    assert found.keys() == delta.sites.keys()
    for name, site in delta.sites.items():
        assert torch.equal(found[name], reference.restored(site, base.tensor(name))), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "restored")


def test_evaluate_compares_with_the_fine_tune(made: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = made
    compress(folder / "base", folder / "finetune", tmp_path / "fine", CompressOptions(bits=8))
    rough, fine = (
        evaluate(folder / "base", delta, folder / "finetune", folder / "text.txt", max_tokens=128)
        for delta in (folder / "delta", tmp_path / "fine")
    )
    assert fine.kl < rough.kl < 0.1
    assert fine.top1_agreement > 0.98


@pytest.mark.parametrize("preset", PRESETS)
def test_moe_experts_left_alone_cost_nothing(made: tuple[str, Path], tmp_path: Path, preset: str) -> None:
    """The trunk changed and one MoE expert did: the others are shared."""
    _, folder = made
    ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("base", "finetune"))
    mixed = {
        name: ours[name] if ".experts." in name and ".experts.2." not in name else tensor
        for name, tensor in theirs.items()
    }
    shutil.copytree(folder / "finetune", tmp_path / "mixed")
    save_file(mixed, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    compress(folder / "base", tmp_path / "mixed", tmp_path / "delta", CompressOptions(preset=preset))
    for name, site in Delta.open(tmp_path / "delta").sites.items():
        assert (site.nbytes > 0) == (mixed[name] is theirs[name]), name
