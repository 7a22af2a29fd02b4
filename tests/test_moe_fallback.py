"""Low-bit copies that answer for MoE experts which are not in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from families import config_of, save_random
from meswitch import Engine, quantize, reference
from meswitch.compression.options import CompressOptions
from meswitch.engine.offloaded import Offloading
from meswitch.errors import BaseMismatchError, BudgetError, RequestError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.names import ParameterNames, StackPlace
from meswitch.kernels.torch import TorchKernels
from meswitch.layers.moe import MoeWrapper, packed_experts
from meswitch.moe.copies import load_copies
from meswitch.moe.fallback import FallbackExperts
from meswitch.moe.store import MoeStore
from meswitch.moe.trunk import load_trunk
from meswitch.site import Site
from test_engine_families import alone, in_order, prompts_of, watch
from test_moe_offload import FAMILIES, least_budget, logits, save


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fallback")
    base = save(folder, "mixtral")
    for bits in (2, 8):
        quantize(base, folder / f"{bits}bit", CompressOptions(bits=bits))
    return base


def copies_of(base: Path, bits: int) -> Path:
    return base.parent / f"{bits}bit"


def packed(model: Any, module: nn.Module, sites: list[Site]) -> MoeWrapper:
    return packed_experts(module, TorchKernels(), ParameterNames(model).stack_place, sites)


def test_with_every_choice_fetched_it_is_the_whole_model(base: Path) -> None:
    model, stacks = load_trunk(Checkpoint(base))
    store, copies = MoeStore(least_budget(base), stacks, 2), load_copies(copies_of(base, 2), Checkpoint(base))
    modules = []
    for name, layer in store.layers.items():
        module = model.get_submodule(name)
        module.forward = FallbackExperts(module, layer, packed(model, module, copies[name]), fetched=2)
        modules.append(module.forward)
    whole, ids = AutoModelForCausalLM.from_pretrained(base), torch.tensor(prompts_of(45))
    assert all(map(torch.equal, logits(model, ids), logits(whole, ids)))
    assert all(module.choices == 45 * 2 and module.copied == 0 for module in modules)


def test_light_choices_that_are_not_in_memory_are_the_copies(base: Path) -> None:
    model, stacks = load_trunk(Checkpoint(base))
    store, copies = MoeStore(least_budget(base), stacks, 1), load_copies(copies_of(base, 2), Checkpoint(base))
    whole = AutoModelForCausalLM.from_pretrained(base)
    name, layer = next(iter(store.layers.items()))
    module, exact = model.get_submodule(name), whole.get_submodule(name)
    fallback = FallbackExperts(module, layer, packed(model, module, copies[name]), fetched=1)
    place = ParameterNames(model).stack_place
    x = torch.randn(4, 32)
    index = torch.tensor([[0, 1], [2, 0], [3, 2], [8, 8]])  # the last only fills up the step
    weights = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1], [0.5, 0.5]])
    fetched = {0, 3}  # the heaviest of each token

    def product(token: int, number: int) -> torch.Tensor:
        if number in fetched:
            up, down = exact.gate_up_proj[number], exact.down_proj[number]
        else:
            dense = {place(site.name): reference.dense(site) for site in copies[name]}
            gate, up, down = (
                dense[StackPlace(f"{name}.{stack}", number, piece)]
                for stack, piece in (("gate_up_proj", 0), ("gate_up_proj", 1), ("down_proj", 0))
            )
            up = torch.cat([gate, up])
        return down @ module._apply_gate(up @ x[token])

    with torch.inference_mode():
        found = fallback(x, index, weights)
        for token in range(3):
            choices = zip(index[token].tolist(), weights[token], strict=True)
            expected = torch.stack([weight * product(token, number) for number, weight in choices]).sum(dim=0)
            torch.testing.assert_close(found[token], expected, rtol=1e-4, atol=1e-4)
        assert not found[3].any()
        assert (fallback.choices, fallback.copied, layer.misses) == (6, 3, 4)
        # What is in memory now is exact, light or not.
        again = fallback(x[:1], torch.tensor([[3, 0]]), torch.tensor([[0.9, 0.1]]))
        expected = exact(x[:1], torch.tensor([[3, 0]]), torch.tensor([[0.9, 0.1]]))
        assert torch.equal(again, expected) and (fallback.choices, fallback.copied) == (8, 3)


def test_a_batch_through_the_engine(base: Path) -> None:
    prompts, budget = prompts_of(5, 60, 17, 33), least_budget(base)
    whole = AutoModelForCausalLM.from_pretrained(base)
    settings = {"kv_budget": "16MiB", "max_batch_tokens": 48, "moe_budget": budget}
    with Engine(base, **settings) as engine:
        engine.generate(prompts, max_new_tokens=8)
        exact = engine.stats()["moe"]
        assert "copied" not in exact
    with Engine(base, moe_mode="fallback", moe_copies=copies_of(base, 8), **settings) as engine:
        seen = watch(engine)
        answers = engine.generate(prompts, max_new_tokens=8)
        counters = engine.stats()["moe"]
    assert 0 < counters["copied"] < counters["choices"] // 2
    assert counters["loaded_bytes"] < exact["loaded_bytes"]
    for rows, prompt, answer in zip(in_order(seen), prompts, answers, strict=True):
        expected = alone(whole, prompt, answer.token_ids)
        assert (rows - expected).abs().max() <= 5e-2 * expected.abs().max()


def test_what_cannot_be_served_is_refused(base: Path, tmp_path: Path) -> None:
    budget, copies = least_budget(base), copies_of(base, 2)
    for wrong, match in (
        ({"moe_mode": "some"}, "moe_mode: expected one of exact, fallback, virtual"),
        ({"moe_mode": "fallback"}, "moe_copies: expected a folder"),
        ({"moe_copies": copies}, "moe_copies: expected a folder"),
        ({"moe_mode": "fallback", "moe_copies": copies, "moe_fetched": 0}, "moe_fetched"),
        ({"moe_mode": "fallback", "moe_copies": copies, "exact": True}, "exact: expected False"),
        ({"moe_mode": "fallback", "moe_copies": copies, "moe_budget": None}, "moe_budget: expected a number"),
    ):
        with pytest.raises(RequestError, match=match):
            Engine(base, **{"moe_budget": budget, **wrong})
    with pytest.raises(RequestError, match="expected the device cpu"):
        Offloading.of(budget, "exact", None, 1, None, None, None, cpu=False, exact=False)
    with pytest.raises(RequestError, match="moe_fetched: expected moe_mode='fallback' beside it, found 'exact'"):
        Engine(base, moe_budget=budget, moe_fetched=2)
    with pytest.raises(RequestError, match="moe_trace: expected another file than that of trace"):
        Engine(base, moe_budget=budget, trace=tmp_path / "trace", moe_trace=tmp_path / "trace")
    with pytest.raises(RequestError, match="moe_trace: expected moe_mode='exact' or 'fallback' beside it"):
        Engine(base, moe_budget=budget, moe_mode="virtual", moe_trace=tmp_path / "trace")
    with pytest.raises(UnsupportedModelError, match="found a plain checkpoint"):
        load_copies(base, Checkpoint(base))
    other = save_random(tmp_path / "other", config_of("mixtral", **FAMILIES["mixtral"]), seed=5)
    with pytest.raises(BaseMismatchError):
        load_copies(copies, Checkpoint(other))
    with pytest.raises(BudgetError, match="the 1 MoE experts"):
        Engine(base, moe_budget=budget // 4, moe_mode="fallback", moe_copies=copies)
    transposed = save(tmp_path, "gpt_oss")
    quantize(transposed, tmp_path / "quantized")
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts: .* found GptOssExperts"):
        load_copies(tmp_path / "quantized", Checkpoint(transposed))
