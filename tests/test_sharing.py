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
from meswitch.compression.calibration import calibrate
from meswitch.compression.job import quantize
from meswitch.compression.sensitivity import measure_sensitivity
from meswitch.compression.sharing.deltas import BASE_BITS
from meswitch.compression.sharing.job import SharingReport, share
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.errors import ArchitectureError, BudgetError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
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


def files_bytes(report: SharingReport) -> int:
    """Of the weights that are served: base and deltas, with manifests."""
    folders = [report.base, *report.experts.values()]
    kinds = ("*.safetensors", "meswitch.json")
    return sum(file.stat().st_size for folder in folders for kind in kinds for file in folder.glob(kind))


def assert_served(report: SharingReport, folder: Path) -> None:
    """Every model's text and scores in a mixed batch are those of the model that `restore` makes of it."""
    found = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in restored(report, folder).items()}
    assert_alike(report.base, report.experts["a"].parent, found, ["a", "b", "c"], prompts_of(5, 40, 9))


def test_deltas_against_the_nearest_model(models: dict[str, Path], tmp_path: Path) -> None:
    size = total_bytes(models)
    report = share(models, tmp_path / "deltas", 2 * size, base_bits=16)
    assert report.base in (models["b"], models["c"]) and report.bytes <= 2 * size and report.base_bits == 16
    name = report.base.name
    assert all(site.kind == "shared" for site in Delta.open(report.experts[name]).sites.values())
    assert_served(report, tmp_path / "restored")
    assert sorted(path.name for path in (tmp_path / "deltas").iterdir()) == ["experts"]


@pytest.mark.parametrize("bits", [8, 4])
def test_deltas_against_the_mean_packed(models: dict[str, Path], tmp_path: Path, bits: int) -> None:
    size = total_bytes(models)
    report = share(models, tmp_path / "deltas", 2 * size, base_bits=bits)
    assert report.base == tmp_path / "deltas" / "base" and report.base_bits == bits
    assert Delta.open(report.base).kind == "base" and files_bytes(report) == report.bytes <= 2 * size
    assert sorted(path.name for path in (tmp_path / "deltas").iterdir()) == ["base", "experts"]
    assert_served(report, tmp_path / "restored")
    own = {name: weights(path) for name, path in models.items()}
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    mean = sum(tensors[name].float() for tensors in own.values()) / 3
    error = Checkpoint.open(report.base).tensor(name) - mean
    assert error.square().sum() < 0.02 * mean.square().sum()


def test_the_base_has_the_bits_with_which_deltas_lose_least(models: dict[str, Path], tmp_path: Path) -> None:
    budget = 2 * total_bytes(models)
    report = share(models, tmp_path / "chosen", budget)
    assert report.bytes <= budget

    def error(report: SharingReport, folder: Path) -> float:
        """Of restored weights of matrices, relative to them, a weight a weight."""
        total = 0.0
        for name, path in restored(report, folder).items():
            found, own = weights(path), weights(models[name])
            for tensor, other in ((own[parameter].float(), found[parameter].float()) for parameter in own):
                if tensor.dim() == 2:
                    total += float((tensor - other).square().mean() / tensor.square().mean()) * tensor.numel()
        return total

    chosen = error(report, tmp_path / "chosen-whole")
    for bits in BASE_BITS:
        forced = share(models, tmp_path / f"{bits}", budget, base_bits=bits)
        assert forced.bytes <= budget and chosen <= 1.05 * error(forced, tmp_path / f"{bits}-whole")


@pytest.mark.parametrize("bits", [None, 16, 4])
def test_a_budget_that_is_too_small_is_refused_with_the_least(
    models: dict[str, Path], tmp_path: Path, bits: int | None
) -> None:
    with pytest.raises(BudgetError, match=r"expected a budget of at least [0-9,]+ bytes, found 1,000") as error:
        share(models, tmp_path / "less", 1000, base_bits=bits)
    least = error.value.least
    assert least is not None and not (tmp_path / "less").exists()
    report = share(models, tmp_path / "least", least, base_bits=bits)
    assert report.bytes <= least
    with pytest.raises(BudgetError):
        share(models, tmp_path / "less", least - 1, base_bits=bits)


def test_text_decides_which_moe_experts_get_more_bits(models: dict[str, Path], tmp_path: Path) -> None:
    """A model that has read text gives least to the MoE experts that it does not use."""
    text = tmp_path / "text.txt"
    text.write_text("it was a bright cold day in april and the clocks were striking thirteen " * 20)
    calibrations = {name: calibrate(path, text) for name, path in models.items()}
    sensitivities = {name: measure_sensitivity(path, text, calibrations[name]) for name, path in models.items()}
    budget = 2 * total_bytes(models)
    known = {"calibrations": calibrations, "sensitivities": sensitivities}
    report = share(models, tmp_path / "text", budget, base_bits=4, **known)  # type: ignore[arg-type]
    assert files_bytes(report) <= budget
    use = calibrations["a"].moe_expert_tokens["model.layers.0.mlp.experts"]
    sizes = [0] * len(use)
    for name, site in Delta.open(report.experts["a"]).sites.items():
        if "layers.0.mlp.experts." in name:
            sizes[int(name.split(".experts.")[1].split(".")[0])] += site.nbytes
    assert sizes[int(use.argmin())] == min(sizes) < sizes[int(use.argmax())]


def test_deltas_against_a_quantized_base(models: dict[str, Path], tmp_path: Path) -> None:
    quantize(models["a"], tmp_path / "base-4bit")
    report = share(models, tmp_path / "deltas", PLENTY, base=tmp_path / "base-4bit")
    assert report.base == tmp_path / "base-4bit" and set(report.experts) == set("abc") and report.base_bits is None
    with pytest.raises(BudgetError, match="budget of at least"):
        share(models, tmp_path / "less", 100, base=tmp_path / "base-4bit")
    with pytest.raises(ValueError, match="no base bits for a base that is quantized, found 4"):
        share(models, tmp_path / "less", PLENTY, base=tmp_path / "base-4bit", base_bits=4)


def test_a_given_base_is_packed_too(models: dict[str, Path], tmp_path: Path) -> None:
    report = share(models, tmp_path / "deltas", PLENTY, base=models["a"], base_bits=8)
    assert report.base == tmp_path / "deltas" / "base"
    name = "model.layers.0.self_attn.q_proj.weight"
    error = Checkpoint.open(report.base).tensor(name) - weights(models["a"])[name].float()
    assert error.abs().max() < 0.02 * weights(models["a"])[name].abs().max()
    whole = share(models, tmp_path / "whole", PLENTY, base=models["a"], base_bits=16)
    assert whole.base == models["a"]


def test_the_command_writes_and_scores(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("it was a bright cold day in april and the clocks were striking thirteen " * 20)
    given = [f"one={models['a']}", str(models["b"])]
    options = ["--calibrate", f"b={tmp_path / 'text.txt'}", "--quality", f"one={tmp_path / 'text.txt'}"]
    report = read("moe", "share", *given, "-o", tmp_path / "out", "--budget", "1MB", *options)
    assert set(report["experts"]) == {"one", "b"} and report["bytes"] <= 1e6
    assert set(report["quality"]) == {"one"} and report["quality"]["one"]["tokens"] > 0
    said = run("moe", "share", *given, "-o", tmp_path / "some", "--budget", "1MB", "--plan", "owners")
    assert said.exit_code == 0 and "MoE experts are one model's for all" in said.stdout
    for wrong in (
        ["--plan", "average"],
        ["--base-bits", "5"],
        ["--plan", "owners", "--base-bits", "4"],
        ["--quality", f"two={tmp_path}"],
        ["--calibrate", "b"],
    ):
        assert run("moe", "share", *given, "-o", tmp_path / "no", "--budget", "1MB", *wrong).exit_code == 2
    assert run("moe", "share", given[0], "-o", tmp_path / "no", "--budget", "1MB").exit_code == 2
    said = run("moe", "share", *given, "-o", tmp_path / "no", "--budget", "1kB")
    assert said.exit_code == 1 and "expected a budget of at least" in said.stderr


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
    with pytest.raises(ValueError, match="no base for plan medoids, found base bits 4"):
        share(models, tmp_path / "out", PLENTY, plan="medoids", base_bits=4)
    with pytest.raises(ValueError, match="expected base bits of 16, 8, 4, 3, 2, found 5"):
        share(models, tmp_path / "out", PLENTY, base_bits=5)
    quantize(models["a"], tmp_path / "quantized")
    with pytest.raises(UnsupportedModelError, match="the quantized model b"):
        share({"a": models["a"], "b": tmp_path / "quantized"}, tmp_path / "out", PLENTY)
    assert not (tmp_path / "out").exists()
