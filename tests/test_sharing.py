"""Several fine-tunes of one mixture of experts within a budget: what is shared, what is stored, what is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random
from meswitch.compression.job import quantize
from meswitch.compression.sharing import SharingReport, share
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.errors import ArchitectureError, BudgetError, UnsupportedModelError
from test_cli import read, run
from test_engine_families import MOE_FAMILIES, assert_alike, prompts_of

PLENTY = 1 << 30


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """a, b and c; b and c are near to each other, and one MoE expert is the same in all."""
    folder = tmp_path_factory.mktemp("models")
    base = save_random(folder / "base", config_of("qwen3_moe", **MOE_FAMILIES["qwen3_moe"]))
    a, b = (save_finetune(folder / name, base, seed) for seed, name in enumerate("ab"))
    c = save_finetune(folder / "c", b, 7, strength=0.05)
    same = {name: tensor for name, tensor in weights(base).items() if "layers.1.mlp.experts.2." in name}
    for path in (a, b, c):
        save_file({**weights(path), **same}, path / "model.safetensors", metadata={"format": "pt"})
    return {"a": a, "b": b, "c": c}


def moe_expert(name: str) -> str:
    layer, number = name.split(".")[2], name.split(".experts.")[1].split(".")[0]
    return f"{layer}.{number}"


def restored(report: SharingReport, folder: Path) -> dict[str, Path]:
    for name, delta in report.experts.items():
        restore(report.base, delta, folder / name)
    return {name: folder / name for name in report.experts}


def total_bytes(models: dict[str, Path]) -> int:
    return sum(tensor.nbytes for tensor in weights(models["a"]).values())


@pytest.mark.parametrize("plan", ["owners", "medoids"])
def test_a_shared_moe_expert_is_its_owners_and_any_other_its_own(
    models: dict[str, Path], tmp_path: Path, plan: str
) -> None:
    least = share(models, tmp_path / "least", budget_of(models, tmp_path, plan), plan=plan)  # type: ignore[arg-type]
    assert (least.shared, least.moe_experts, least.identical) == (8, 8, 1)
    own = [tensor for name, tensor in weights(models["a"]).items() if ".experts." in name]
    budget = least.bytes + 2 * sum(tensor.nbytes + 600 for tensor in own) // 2  # half of the MoE experts of two models
    report = share(models, tmp_path / "some", budget, plan=plan)  # type: ignore[arg-type]
    assert 0 < report.shared < 8 and report.bytes <= budget
    owners = json.loads((report.base / "sharing.json").read_text())["owners"]
    own, shared = {name: weights(path) for name, path in models.items()}, set()
    for name, path in restored(report, tmp_path / "restored").items():
        for parameter, tensor in weights(path).items():
            if ".experts." not in parameter:
                continue
            owner = owners[moe_expert(parameter)]
            if not torch.equal(tensor, own[name][parameter]):
                assert torch.equal(tensor, own[owner][parameter]), parameter
                shared.add(moe_expert(parameter))
    assert len(shared) <= report.shared
    assert len(shared) >= report.shared - report.identical


def budget_of(models: dict[str, Path], folder: Path, plan: str) -> int:
    """The least budget, which the error names."""
    with pytest.raises(BudgetError, match="all MoE experts shared") as error:
        share(models, folder / "refused", 1, plan=plan)  # type: ignore[arg-type]
    return int(str(error.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))


def test_medoids_do_less_damage_than_owners_in_turn(models: dict[str, Path], tmp_path: Path) -> None:
    """b and c are alike, so one of them is the owner wherever all three share."""
    budget = budget_of(models, tmp_path, "medoids")
    report = share(models, tmp_path / "medoids", budget, plan="medoids")
    owners = json.loads((report.base / "sharing.json").read_text())["owners"]
    del owners["1.2"]  # the same in all
    assert set(owners.values()) <= {"b", "c"}
    used = {"a": dict.fromkeys([(0, 0)], 100.0)}
    report = share(models, tmp_path / "used", budget + 1024, plan="medoids", uses=used)
    owners = json.loads((report.base / "sharing.json").read_text())["owners"]
    assert owners["0.0"] == "a" and owners["0.1"] != "a"


def test_deltas_against_the_nearest_model(models: dict[str, Path], tmp_path: Path) -> None:
    size = total_bytes(models)
    report = share(models, tmp_path / "deltas", 2 * size)
    assert report.base in (models["b"], models["c"]) and report.bytes <= 2 * size
    name = report.base.name
    assert all(site.kind == "shared" for site in Delta.open(report.experts[name]).sites.values())
    found = {
        name: AutoModelForCausalLM.from_pretrained(path) for name, path in restored(report, tmp_path / "r").items()
    }
    assert_alike(report.base, tmp_path / "deltas" / "experts", found, ["a", "b", "c"], prompts_of(5, 40, 9))


def test_deltas_against_a_quantized_base(models: dict[str, Path], tmp_path: Path) -> None:
    quantize(models["a"], tmp_path / "base-4bit")
    report = share(models, tmp_path / "deltas", PLENTY, base=tmp_path / "base-4bit")
    assert report.base == tmp_path / "base-4bit" and set(report.experts) == set("abc")
    with pytest.raises(BudgetError, match="base alone"):
        share(models, tmp_path / "less", 100, base=tmp_path / "base-4bit")


def test_the_command_writes_and_scores(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("it was a bright cold day in april and the clocks were striking thirteen " * 20)
    given = [f"one={models['a']}", str(models["b"])]
    options = ["--calibrate", f"b={tmp_path / 'text.txt'}", "--quality", f"one={tmp_path / 'text.txt'}"]
    report = read("moe", "share", *given, "-o", tmp_path / "out", "--budget", "1MB", *options)
    assert set(report["experts"]) == {"one", "b"} and report["bytes"] <= 1e6
    assert set(report["quality"]) == {"one"} and report["quality"]["one"]["tokens"] > 0
    said = run("moe", "share", *given, "-o", tmp_path / "some", "--budget", "1MB", "--plan", "owners")
    assert said.exit_code == 0 and "MoE experts are one model's for all" in said.stdout
    for wrong in (["--plan", "average"], ["--quality", f"two={tmp_path}"], ["--calibrate", "b"]):
        assert run("moe", "share", *given, "-o", tmp_path / "no", "--budget", "1MB", *wrong).exit_code == 2
    assert run("moe", "share", given[0], "-o", tmp_path / "no", "--budget", "1MB").exit_code == 2
    said = run("moe", "share", *given, "-o", tmp_path / "no", "--budget", "1kB")
    assert said.exit_code == 1 and "expected a budget above" in said.stderr


def test_what_cannot_be_shared_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    dense = save_random(tmp_path / "dense", config_of("llama"))
    other = save_random(
        tmp_path / "other", config_of("qwen3_moe", **{**MOE_FAMILIES["qwen3_moe"], "moe_intermediate_size": 24})
    )
    with pytest.raises(UnsupportedModelError, match="found none in"):
        share({"a": dense, "b": dense}, tmp_path / "out", PLENTY)
    with pytest.raises(ArchitectureError):
        share({"a": models["a"], "b": other}, tmp_path / "out", PLENTY)
    with pytest.raises(ValueError, match="expected a plan of deltas, owners, medoids"):
        share(models, tmp_path / "out", PLENTY, plan="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no base for plan owners"):
        share(models, tmp_path / "out", PLENTY, plan="owners", base=models["a"])
    quantize(models["a"], tmp_path / "quantized")
    with pytest.raises(UnsupportedModelError, match="the quantized model b"):
        share({"a": models["a"], "b": tmp_path / "quantized"}, tmp_path / "out", PLENTY)
    assert not (tmp_path / "out").exists()
