"""A quantized model as the base: of deltas, of an engine, of a router, of everything that takes one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from families import VOCABULARY, config_of, save_finetune, save_random
from families import quantize as quantize_site
from meswitch import (
    Delta,
    DistillOptions,
    Engine,
    compress,
    distill,
    evaluate,
    import_adapter,
    quantize,
    reference,
    restore,
    train_router,
)
from meswitch.compression.options import CompressOptions
from meswitch.compression.plan import Plan, make_plans
from meswitch.demo.paths import Family
from meswitch.engine.packed import load_packed
from meswitch.errors import (
    BaseMismatchError,
    CheckpointError,
    ChecksumError,
    FormatError,
    RouterError,
    UnsupportedModelError,
)
from meswitch.huggingface.checkpoint import HEAD, Checkpoint
from meswitch.huggingface.models import is_placeholder, load_model
from meswitch.huggingface.names import StackPlace
from meswitch.kernels.cpu import CpuKernels
from meswitch.kernels.rows import BASE_SLOT
from meswitch.kernels.torch import TorchKernels
from meswitch.layers.moe import MoeWrapper, is_plain
from meswitch.layers.step import Step
from test_adapter import as_peft, save_adapter
from test_cli import read, run
from test_engine_families import (
    MOE_FAMILIES,
    SERVED,
    alone,
    assert_alike,
    in_order,
    prompts_of,
    save_tied_otherwise,
    watch,
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the same quantized, and a fine-tune."""
    folder = tmp_path_factory.mktemp("llama")
    base = save_random(folder / "base", config_of("llama"))
    quantize(base, folder / "quantized")
    save_finetune(folder / "tuned", base, seed=3)
    return folder


def served(
    folder: Path, base: Path, tuned: dict[str, Path], preset: str = "default"
) -> tuple[Path, Path, dict[str, Any]]:
    """A base quantized, the experts' folder, and every model that a request may name, whole."""
    quantized = folder / "quantized"
    quantize(base, quantized)
    restore(None, quantized, folder / "restored" / "base")
    for name, path in tuned.items():
        compress(quantized, path, folder / "experts" / name, preset)
        restore(quantized, folder / "experts" / name, folder / "restored" / name)
    names = ["base", *tuned]
    models = {name: AutoModelForCausalLM.from_pretrained(folder / "restored" / name) for name in names}
    return quantized, folder / "experts", models


@pytest.mark.parametrize("family", SERVED)
def test_mixed_batch_equals_each_model_alone(family: str, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of(family))
    tuned = {name: save_finetune(tmp_path / f"tuned-{name}", base, seed) for seed, name in enumerate("ab", 10)}
    quantized, experts, models = served(tmp_path, base, tuned)
    # Of 100 tokens some steps are all of one expert, or of the base, and are multiplied tile by tile.
    names, prompts = ["a", "base", "b", "a", "base"], prompts_of(5, 100, 17, 100, 1)
    for exact in (True, False):
        assert_alike(quantized, experts, models, names, prompts, exact=exact)


@pytest.mark.parametrize("preset", ["small", "me-switch"])
@pytest.mark.parametrize("base_tied", [True, False])
def test_heads_of_every_kind(base_tied: bool, preset: str, tmp_path: Path) -> None:
    """A grown vocabulary, whole embeddings, and a head that is tied where the base's is not, or the other way round."""
    base = save_random(tmp_path / "base", config_of("llama", tie_word_embeddings=base_tied))
    tuned = {
        "grown": save_finetune(tmp_path / "tuned-grown", base, 1, grow=5),
        "other": save_tied_otherwise(tmp_path, base, base_tied=base_tied),
    }
    quantized, experts, models = served(tmp_path, base, tuned, preset)
    prompts = prompts_of(6, 20, 70, 9)
    prompts[0][2] = VOCABULARY + 4
    assert_alike(quantized, experts, models, ["grown", "other", "other", "base"], prompts)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_moe_experts_stay_packed(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save_random(tmp_path / "base", config_of(family, **MOE_FAMILIES[family]))
    quantized, experts, models = served(tmp_path, base, {})
    experts.mkdir()
    for exact in (True, False):
        assert_alike(quantized, experts, models, ["base", "base", "base"], prompts_of(5, 100, 30), exact=exact)
    assert "decoded" not in caplog.text
    model, packed = load_packed(Checkpoint(quantized), "auto")
    assert packed.moe_experts and all(
        is_placeholder(model.get_submodule(name).down_proj) for name in packed.moe_experts
    )
    whole = load_model(Checkpoint(quantized))  # nothing is left of how it was loaded
    assert not any(map(is_placeholder, whole.parameters()))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_moe_experts_of_fine_tunes_on_packed_ones(family: str, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of(family, **MOE_FAMILIES[family]))
    tuned = {name: save_finetune(tmp_path / name, base, seed) for seed, name in enumerate("ab")}
    quantized, experts, models = served(tmp_path, base, tuned)
    for exact in (True, False):
        assert_alike(quantized, experts, models, ["a", "base", "b"], prompts_of(5, 80, 30), exact=exact)


def test_moe_experts_of_every_kind_of_site(tmp_path: Path) -> None:
    """Weights of 16 bits, zeros and the base's own among those of few bits, in the base and in a fine-tune."""
    base = save_random(tmp_path / "base", config_of("mixtral", **MOE_FAMILIES["mixtral"]))
    tuned = save_finetune(tmp_path / "tuned", base, 1)
    matrix = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    change(base, {matrix.format(0, 1, "w2"): 0.0, matrix.format(1, 3, "w1"): 0.0})
    change(tuned, {matrix.format(0, 1, "w2"): 0.0})
    shared = matrix.format(1, 2, "w3")
    change(tuned, {shared: load_file(base / "model.safetensors")[shared]})
    whole = {matrix.format(layer, layer, name) for layer in (0, 1) for name in ("w1", "w2")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meswitch.compression.job.make_plans", partial(plans_with_whole, whole))
        quantized, experts, models = served(tmp_path, base, {"tuned": tuned})
    kinds = {name: site.kind for name, site in Delta.open(experts / "tuned").sites.items() if ".experts." in name}
    assert set(kinds.values()) == {"quantized", "replaced", "shared"}
    for exact in (True, False):
        assert_alike(quantized, experts, models, ["tuned", "base"], prompts_of(5, 80), exact=exact)


def change(folder: Path, values: dict[str, Any]) -> None:
    """Overwrites tensors of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in values.items():
        tensors[name] = torch.zeros_like(tensors[name]) + value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def plans_with_whole(whole: set[str], *args: Any) -> Iterator[Plan]:
    """`make_plans`, with some sites stored uncompressed."""
    for plan in make_plans(*args):
        yield replace(plan, rule=None) if plan.name in whole else plan


def test_moe_experts_of_another_form_are_refused_in_a_delta(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("gpt_oss", num_local_experts=4, num_experts_per_tok=2))
    tuned = save_finetune(tmp_path / "tuned", base, 1)
    own = load_file(base / "model.safetensors")
    change(tuned, {name: tensor for name, tensor in own.items() if not name.endswith("experts.gate_up_proj")})
    compress(base, tuned, tmp_path / "experts" / "tuned")
    with pytest.raises(UnsupportedModelError, match="MoE experts of type GptOssExperts"):
        Engine(base, experts={"tuned": tmp_path / "experts" / "tuned"}, max_batch_tokens=64)


def test_moe_experts_of_another_form_are_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meswitch.moe.copies.is_plain", lambda module: False)
    base = save_random(tmp_path / "base", config_of("mixtral", **MOE_FAMILIES["mixtral"]))
    quantized, experts, models = served(tmp_path, base, {})
    experts.mkdir()
    assert_alike(quantized, experts, models, ["base", "base"], prompts_of(5, 30))
    assert "24 matrices are decoded" in caplog.text


def test_which_moe_experts_is_plain() -> None:
    def of(family: str, **changes: Any) -> bool:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(family, **changes))
        return all(is_plain(module) for name, module in model.named_modules() if name.endswith(".experts"))

    assert of("mixtral", **MOE_FAMILIES["mixtral"]) and of("olmoe", **MOE_FAMILIES["olmoe"])
    assert not of("gpt_oss", num_local_experts=4)  # transposed, interleaved, with biases


def test_rows_that_only_fill_up_a_step_choose_no_moe_expert() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("mixtral", **MOE_FAMILIES["mixtral"]))
    module = model.model.layers[0].mlp.experts
    width, inner = module.hidden_dim, module.intermediate_dim
    stacks = {"gate_up_proj": [(inner, width)] * 2, "down_proj": [(width, inner)]}
    sites = {
        StackPlace(stack, moe_expert, piece): quantize_site(
            f"{stack} {moe_expert} {piece}", torch.zeros(shape), torch.randn(shape), transposed=False
        )
        for stack, shapes in stacks.items()
        for piece, shape in enumerate(shapes)
        for moe_expert in range(4)
    }
    places = {site.name: place for place, site in sites.items()}
    x, weights = torch.randn(3, width), torch.rand(3, 2)
    index = torch.tensor([[0, 3], [4, 4], [2, 4]])
    for kernels in (CpuKernels(exact=True), TorchKernels()):
        wrapper = MoeWrapper("experts", module, Step(), kernels, places.get, packed=True)
        for name, site in ((site.name, site) for site in sites.values()):
            wrapper.set(BASE_SLOT, places[name].parameter, site)
        found = wrapper.forward(x, index, weights)
        expected = torch.zeros_like(x)
        for token, choice in ((0, 0), (0, 1), (2, 0)):
            chosen = int(index[token, choice])
            gate, up, down = (
                reference.dense(sites[StackPlace(stack, chosen, piece)])
                for stack, shapes in stacks.items()
                for piece in range(len(shapes))
            )
            hidden = module._apply_gate(torch.cat([gate, up]) @ x[token])
            expected[token] += weights[token, choice] * (down @ hidden)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_matrices_stay_packed(llama: Path) -> None:
    model, packed = load_packed(Checkpoint(llama / "quantized"), "auto")
    assert not packed.moe_experts
    matrices = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    assert packed.weights.keys() == matrices
    for name, parameter in model.named_parameters():
        assert is_placeholder(parameter) == (name.rpartition(".")[0] in matrices)
        assert parameter.isnan().all() == is_placeholder(parameter)
    with pytest.raises(AssertionError):  # what computes with such a weight does not go unnoticed
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_it_reads_as_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    source, quantized = Checkpoint(llama / "base"), Checkpoint(llama / "quantized")
    restore(None, llama / "quantized", tmp_path / "restored")
    restored = Checkpoint(tmp_path / "restored")
    assert quantized.is_quantized and not restored.is_quantized
    assert quantized.names() == source.names() == restored.names()
    for name in quantized.names():
        tensor = quantized.tensor(name)
        assert tensor.shape == source.shape(name) == quantized.shape(name) and tensor.dtype == quantized.dtype(name)
        assert torch.equal(tensor.to(restored.dtype(name)), restored.tensor(name)), name
    parts = quantized.with_parameters({"top": ("model.embed_tokens.weight", (64, [2, 32]))})
    assert torch.equal(parts.tensor("top"), quantized.tensor("model.embed_tokens.weight").flatten()[64:128].view(2, 32))
    with pytest.raises(CheckpointError, match="expected a tensor nothing"):
        quantized.tensor("nothing")
    whole, again = load_model(quantized, torch.float32), load_model(restored, torch.float32)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_transposed_and_tied_matrices_read_as_they_were(family: str, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of(family))
    quantize(base, tmp_path / "quantized", CompressOptions(bits=8))
    source, quantized = Checkpoint(base), Checkpoint(tmp_path / "quantized")
    assert (HEAD in source) == (HEAD in quantized)
    for name in source.names():
        difference = quantized.tensor(name).float() - source.tensor(name).float()
        assert difference.norm() <= 0.01 * source.tensor(name).float().norm(), name


def test_a_delta_fits_the_base_that_it_was_made_against(llama: Path, tmp_path: Path) -> None:
    base, quantized, tuned = llama / "base", llama / "quantized", llama / "tuned"
    compress(quantized, tuned, tmp_path / "ours")
    compress(base, tuned, tmp_path / "theirs")
    quantize(base, tmp_path / "other", CompressOptions(bits=3))
    ours, theirs = Delta.open(tmp_path / "ours"), Delta.open(tmp_path / "theirs")
    ours.verify(quantized)
    for other in (base, tmp_path / "other"):
        with pytest.raises(BaseMismatchError, match="found another in"):
            ours.check_base(other)
    with pytest.raises(BaseMismatchError, match=r"found a quantized form of it in .*\nhint: .*--allow-quantized-base"):
        theirs.check_base(quantized)
    theirs.check_base(quantized, allow_quantized=True)
    with pytest.raises(BaseMismatchError, match="found another in"):
        ours.check_base(base, allow_quantized=True)


def test_deltas_against_the_16_bit_base_only_when_asked(llama: Path, tmp_path: Path) -> None:
    compress(llama / "base", llama / "tuned", tmp_path / "a")
    with pytest.raises(BaseMismatchError, match="quantized form"):
        Engine(llama / "quantized", {"a": tmp_path / "a"}, kv_budget="16MiB")
    with pytest.raises(BaseMismatchError, match="quantized form"):
        restore(llama / "quantized", tmp_path / "a", tmp_path / "restored")
    restore(llama / "quantized", tmp_path / "a", tmp_path / "restored", allow_quantized_base=True)
    restore(None, llama / "quantized", tmp_path / "base")
    models = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        for name, folder in (("a", "restored"), ("base", "base"))
    }
    with Engine(llama / "quantized", {"a": tmp_path / "a"}, exact=True, allow_quantized_base=True) as engine:
        answers = engine.generate(prompts_of(9, 9), expert=["a", "base"], max_new_tokens=4)
    for name, prompt, answer in zip(("a", "base"), prompts_of(9, 9), answers, strict=True):
        ids = torch.tensor([prompt])
        out = models[name].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert out[0, 9:].tolist() == answer.token_ids


def test_a_delta_repairs_what_quantizing_the_base_broke(family: Family, tmp_path: Path) -> None:
    quantize(family.base, tmp_path / "base", CompressOptions(bits=3))
    name, finetune = next(iter(family.experts.items()))
    text = family.heldout[name]
    compress(tmp_path / "base", finetune, tmp_path / "ours")
    compress(family.base, finetune, tmp_path / "theirs")
    ours, theirs = (
        evaluate(
            tmp_path / "base",
            tmp_path / delta,
            finetune,
            text,
            baseline=family.base,
            allow_quantized_base=True,
            max_tokens=4096,
        )
        for delta in ("ours", "theirs")
    )
    own_base = evaluate(tmp_path / "base", tmp_path / "ours", finetune, text, max_tokens=4096)
    assert ours.kl < theirs.kl / 4 and ours.recovered_share is not None and ours.recovered_share > 0.9
    assert own_base.base is not None and ours.base is not None and own_base.base.nll > ours.base.nll


def test_what_is_quantized_is_no_fine_tune_and_not_quantized_again(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="weights in the fine-tune, found a quantized model"):
        compress(llama / "base", llama / "quantized", tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="weights in the model, found a quantized model"):
        quantize(llama / "quantized", tmp_path / "out")
    compress(llama / "base", llama / "tuned", tmp_path / "delta")
    with pytest.raises(CheckpointError, match="expected a checkpoint or a quantized model, found a delta"):
        Engine(tmp_path / "delta")


def test_a_router_is_of_one_form_of_the_base(llama: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"{word} {number}", "expert": word} for word in ("a", "base") for number in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train_router(llama / "quantized", tmp_path / "data.jsonl", tmp_path / "router")
    compress(llama / "quantized", llama / "tuned", tmp_path / "a")
    with Engine(llama / "quantized", {"a": tmp_path / "a"}, router=tmp_path / "router", kv_budget="16MiB") as engine:
        assert engine.generate("a 3", expert="auto", max_new_tokens=1).route is not None
    with pytest.raises(RouterError):
        Engine(llama / "base", router=tmp_path / "router")


def test_the_command_takes_one(llama: Path, tmp_path: Path) -> None:
    quantized = llama / "quantized"
    assert run("compress", quantized, llama / "tuned", "-o", tmp_path / "a").exit_code == 0
    assert run("verify", tmp_path / "a", "--base", quantized).exit_code == 0
    assert read("generate", quantized, "--experts", tmp_path / "a", "--expert", "a", "hello")[0]["expert"] == "a"
    compress(llama / "base", llama / "tuned", tmp_path / "b")
    asked = ["generate", quantized, "--experts", tmp_path / "b", "--expert", "b", "hello"]
    refused = run(*asked)
    assert refused.exit_code == 1 and "--allow-quantized-base" in refused.stderr
    assert run(*asked, "--allow-quantized-base").exit_code == 0


def test_a_damaged_one_is_refused_by_name(llama: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "quantized"
    shutil.copytree(llama / "quantized", damaged)
    with (damaged / "delta.safetensors").open("r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(b"\xff" * 8)
    with pytest.raises(ChecksumError, match="expected checksum"):
        Engine(damaged)
    os.truncate(damaged / "delta.safetensors", 5000)
    with pytest.raises(FormatError):
        Engine(damaged)
    (damaged / "delta.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        Engine(damaged)


def test_files_that_change_while_served_do_no_harm(llama: Path, tmp_path: Path) -> None:
    copy = tmp_path / "quantized"
    shutil.copytree(llama / "quantized", copy)
    with Engine(copy, kv_budget="16MiB") as engine:
        before = engine.generate([1, 2, 3], max_new_tokens=8).token_ids
        os.truncate(copy / "delta.safetensors", 64)
        (copy / "meswitch.json").unlink()
        assert engine.generate([1, 2, 3], max_new_tokens=8).token_ids == before


@pytest.mark.parametrize("method", ["whole", "blocks"])
def test_scales_are_distilled_on_it(llama: Path, tmp_path: Path, method: Any) -> None:
    data = tmp_path / "data.txt"
    data.write_text("it was a bright cold day in april and the clocks were striking thirteen " * 20)
    compress(llama / "quantized", llama / "tuned", tmp_path / "a")
    options = DistillOptions(method, steps=3, window=16, batch=2)
    report = distill(llama / "quantized", llama / "tuned", tmp_path / "a", tmp_path / "b", data, options)
    assert report.kl_after <= report.kl_before
    Delta.open(tmp_path / "b").verify(llama / "quantized")
    with pytest.raises(BaseMismatchError):
        distill(llama / "base", llama / "tuned", tmp_path / "a", tmp_path / "c", data, options)


def test_an_adapter_is_served_on_it(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama / "base", tmp_path / "adapter")
    import_adapter(llama / "quantized", adapter, tmp_path / "a")
    restore(None, llama / "quantized", tmp_path / "restored")
    merged, prompt = as_peft(tmp_path / "restored", adapter), prompts_of(9)[0]
    with Engine(llama / "quantized", {"a": tmp_path / "a"}, exact=True, kv_budget="16MiB") as engine:
        seen = watch(engine)
        answer = engine.generate(prompt, expert="a", max_new_tokens=4)
    expected = alone(merged, prompt, answer.token_ids)
    assert (in_order(seen)[0] - expected).abs().max() <= 1e-3 * expected.abs().max()
