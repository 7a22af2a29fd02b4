"""A model whose MoE experts are read when they are chosen: the same bits as the whole model's, under any budget."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import config_of, save_random, tokenizer_of
from meswitch import Engine, compress, quantize, restore
from meswitch.errors import BudgetError, CheckpointError, RequestError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import is_placeholder
from meswitch.moe.exact import ExactExperts
from meswitch.moe.store import MoeStore
from meswitch.moe.trunk import load_trunk
from test_engine_families import greedy, prompts_of

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": MOE,
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": MOE
    | LATENT
    | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},  # transposed, with biases, a stack on disk
    "nemotron_h": MOE
    | {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "layers_block_type": ["moe", "attention"]},  # no gate
}


def save(folder: Path, family: str, dtype: torch.dtype = torch.float32, **how: Any) -> Path:
    whole = save_random(folder / "float32", config_of(family, **FAMILIES[family]))
    AutoModelForCausalLM.from_pretrained(whole, dtype=dtype).save_pretrained(folder / "base", **how)
    tokenizer_of().save_pretrained(folder / "base")
    return folder / "base"


def least_budget(base: Path) -> int:
    """What the two MoE experts of a token take in a layer, by the error of one that is too small."""
    with pytest.raises(BudgetError) as refused:
        MoeStore(1, load_trunk(Checkpoint(base))[1], 2)
    return int(refused.value.message.split("at least ")[1].split()[0])


def offloaded(base: Path, budget: int) -> tuple[Any, MoeStore]:
    model, stacks = load_trunk(Checkpoint(base))
    store = MoeStore(budget, stacks, 2)
    for name, layer in store.layers.items():
        module = model.get_submodule(name)
        module.forward = ExactExperts(module, layer)
    return model, store


def logits(model: Any, ids: Tensor) -> list[Tensor]:
    """Of a prefill, and of steps of one token and of a few."""
    with torch.inference_mode():
        return [model(own, use_cache=False).logits for own in ids.split([40, 1, 1, 3], dim=1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_whole_models_bit_for_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save(tmp_path, family, dtype)
    whole, ids = AutoModelForCausalLM.from_pretrained(base), torch.tensor(prompts_of(45))
    least = least_budget(base)
    for budget in (least, 100 * least):
        model, store = offloaded(base, budget)
        for implementation in ("grouped_mm", "eager")[: 2 if budget == least else 1]:
            model.set_experts_implementation(implementation)
            whole.set_experts_implementation(implementation)
            for found, expected in zip(logits(model, ids), logits(whole, ids), strict=True):
                assert torch.equal(found, expected), implementation
        counters = store.counters()
        assert counters["bytes"] <= counters["allocated_bytes"] <= budget
        assert counters["hits"] + counters["misses"] == sum(
            layer["hits"] + layer["misses"] for layer in counters["layers"].values()
        )
        assert counters["loaded_bytes"] > 0 and (budget > 10 * least) == (counters["evictions"] == 0)
        store.close()


def test_moe_experts_that_are_split_over_shards(tmp_path: Path) -> None:
    base = save(tmp_path, "mixtral", max_shard_size="20KB")
    stacks = load_trunk(Checkpoint(base))[1]
    files = [{file for file, _, _ in extents} for stack in stacks.values() for extents in stack["gate_up_proj"].extents]
    assert max(map(len, files)) == 2
    model, _ = offloaded(base, least_budget(base))
    whole, ids = AutoModelForCausalLM.from_pretrained(base), torch.tensor(prompts_of(45))
    assert all(map(torch.equal, logits(model, ids), logits(whole, ids)))


def test_moe_experts_are_never_made(tmp_path: Path) -> None:
    base = save(tmp_path, "qwen3_moe")
    model, stacks = load_trunk(Checkpoint(base))
    whole = AutoModelForCausalLM.from_pretrained(base)
    of_stacks = {f"{name}.{leaf}": stack for name, module in stacks.items() for leaf, stack in module.items()}
    absent = {name for name, parameter in model.named_parameters() if is_placeholder(parameter)}
    assert absent == {*of_stacks}
    for name, stack in of_stacks.items():
        parameter = whole.get_parameter(name)
        path, _, leaf = name.rpartition(".")
        stand_in = getattr(model.get_submodule(path), leaf)
        assert is_placeholder(stand_in) and (stand_in.shape, stand_in.dtype) == (parameter.shape, parameter.dtype)
        sizes = [sum(size for _, _, size in extents) for extents in stack.extents]
        assert sizes == [prod(stack.shape) * 4] * 8


def test_rows_that_only_fill_up_a_step_read_nothing(tmp_path: Path) -> None:
    base = save(tmp_path, "mixtral")
    model, store = offloaded(base, 10 * least_budget(base))
    whole = AutoModelForCausalLM.from_pretrained(base)
    name, layer = next(iter(store.layers.items()))
    x, weights = torch.randn(3, 32), torch.rand(3, 2)
    index = torch.tensor([[8, 8], [5, 2], [8, 8]])
    with torch.inference_mode():
        found = model.get_submodule(name)(x, index, weights)
        expected = whole.get_submodule(name)(x[1:2], index[1:2], weights[1:2])
        assert torch.equal(found[1:2], expected) and not found[[0, 2]].any()
        assert (layer.hits, layer.misses) == (0, 4)
        assert not model.get_submodule(name)(x, torch.full((3, 2), 8), weights).any()
        assert model.get_submodule(name)(x[:0], index[:0], weights[:0]).shape == (0, 32)
    assert (layer.hits, layer.misses) == (0, 4)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_batch_through_the_engine(family: str, exact: bool, tmp_path: Path) -> None:
    base, prompts = save(tmp_path, family), prompts_of(5, 60, 17, 33, 1)
    whole = AutoModelForCausalLM.from_pretrained(base)
    with Engine(base, kv_budget="16MiB", max_batch_tokens=48, exact=exact, moe_budget=2 * least_budget(base)) as engine:
        answers = engine.generate(prompts, max_new_tokens=8)
        counters = engine.stats()["moe"]
    assert [answer.token_ids for answer in answers] == [greedy(whole, prompt, 8) for prompt in prompts]
    assert counters["misses"] > 0 and counters["allocated_bytes"] <= counters["budget"] == 2 * least_budget(base)
    assert engine.stats()["moe"] == counters  # those of the end


def save_changed(folder: Path, base: Path, changes: Callable[[str], bool]) -> Path:
    """The base with the parameters moved that `changes` says."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if changes(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3 * parameter.std())
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def test_deltas_change_the_trunk_but_no_moe_expert(tmp_path: Path) -> None:
    base = save(tmp_path, "qwen3_moe")
    trunk = save_changed(tmp_path / "trunk", base, lambda name: ".experts." not in name and "gate.weight" not in name)
    moe = save_changed(tmp_path / "moe", base, lambda name: ".experts." in name)
    for name, tuned in (("trunk", trunk), ("moe", moe)):
        compress(base, tuned, tmp_path / "experts" / name)
    restore(base, tmp_path / "experts" / "trunk", tmp_path / "restored")
    models = {
        "base": AutoModelForCausalLM.from_pretrained(base),
        "trunk": AutoModelForCausalLM.from_pretrained(tmp_path / "restored"),
    }
    names, prompts = ["trunk", "base", "trunk"], prompts_of(9, 30, 21)
    with Engine(base, experts=tmp_path / "experts", exact=True, moe_budget=2 * least_budget(base)) as engine:
        answers = engine.generate(prompts, expert=names, max_new_tokens=6)
        assert "mlp.experts" in str(engine.experts["moe"]["error"])
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        assert answer.token_ids == greedy(models[name], prompt, 6), name
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts"):
        Engine(base, experts={"moe": tmp_path / "experts" / "moe"}, moe_budget=2 * least_budget(base))


def test_a_file_that_is_cut_fails_the_requests_of_a_step(tmp_path: Path) -> None:
    base = save(tmp_path, "mixtral")
    file, prompts = base / "model.safetensors", prompts_of(40, 30)
    with (
        Engine(base, moe_budget=least_budget(base)) as small,
        Engine(base, moe_budget=50 * least_budget(base)) as large,
    ):
        expected = [answer.token_ids for answer in large.generate(prompts, max_new_tokens=4)]
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"model\.safetensors as it was"):
                small.generate(prompts, max_new_tokens=4)
        assert small.stats()["moe"]["failed_loads"] > 0 and small.stats()["requests"]["running"] == 0
        # What needs nothing of the file is answered.
        assert [answer.token_ids for answer in large.generate(prompts, max_new_tokens=4)] == expected


def test_a_file_that_is_removed_or_replaced_does_no_harm(tmp_path: Path) -> None:
    base, prompts = save(tmp_path, "mixtral"), prompts_of(40)
    expected = greedy(AutoModelForCausalLM.from_pretrained(base), prompts[0], 4)
    with Engine(base, moe_budget=least_budget(base)) as engine:
        (base / "model.safetensors").unlink()
        assert engine.generate(prompts[0], max_new_tokens=4).token_ids == expected
        (base / "model.safetensors").write_bytes(b"another")
        assert engine.generate(prompts[0], max_new_tokens=4).token_ids == expected


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    dense = save_random(tmp_path / "dense", config_of("llama"))
    with pytest.raises(UnsupportedModelError, match="found a dense one"):
        Engine(dense, moe_budget="1GiB")
    base = save(tmp_path, "mixtral")
    least = least_budget(base)
    with pytest.raises(BudgetError, match=f"at least {least} bytes.*found {least - 1}"):
        Engine(base, moe_budget=least - 1)
    for wrong in ("much", 0, -1):
        with pytest.raises(RequestError, match="moe_budget"):
            Engine(base, moe_budget=wrong)
    with pytest.raises(UnsupportedModelError, match="on disk, as the model runs, found"):
        Engine(base, moe_budget=least, dtype="bfloat16")
    quantize(base, tmp_path / "quantized")
    with pytest.raises(UnsupportedModelError, match="found a quantized model"):
        Engine(tmp_path / "quantized", moe_budget=least)
    other = save_random(tmp_path / "jetmoe", config_of("jetmoe"))
    with pytest.raises(UnsupportedModelError, match=r"self_attention\.experts: .* found JetMoeMoA"):
        load_trunk(Checkpoint(other))


def test_more_choices_than_the_config_says_are_refused_in_the_step(tmp_path: Path) -> None:
    base = save(tmp_path, "mixtral")
    model, store = offloaded(base, least_budget(base))
    name = next(iter(store.layers))
    with pytest.raises(BudgetError, match="3 MoE experts of a token"):
        model.get_submodule(name)(torch.randn(1, 32), torch.tensor([[0, 1, 2]]), torch.rand(1, 3))


def test_stacks_in_another_form_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meswitch.huggingface.names._stacks_rows", lambda converter: False)
    base = Checkpoint(save(tmp_path, "mixtral"))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj: expected each"):
        load_trunk(base)
