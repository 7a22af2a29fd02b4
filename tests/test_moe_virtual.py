"""Resident sets of MoE experts: what gates may choose, what they weigh it with, and who is resident."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, SwitchTransformersConfig, SwitchTransformersModel

from meswitch.errors import BudgetError, UnsupportedModelError
from meswitch.huggingface.names import moe_blocks
from meswitch.moe.gate import Choice, Gate, take_gates
from meswitch.moe.virtual import (
    Importance,
    Swap,
    VirtualExperts,
    divide,
    largest,
    profile_outputs,
    tail,
    weight_norms,
)

MOE_EXPERTS = 8
_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_MLA = {
    "first_k_dense_replace": 0,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "n_routed_experts": MOE_EXPERTS,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": MOE_EXPERTS},
    "qwen3_moe": {"num_experts": MOE_EXPERTS, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": MOE_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": MOE_EXPERTS},
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_MLA, "num_local_experts": MOE_EXPERTS, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "gpt_oss": {"num_local_experts": MOE_EXPERTS, "head_dim": 8},
    "granitemoe": {"num_local_experts": MOE_EXPERTS},
    "ernie4_5_moe": {
        "moe_num_experts": MOE_EXPERTS,
        "moe_k": 3,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
}


def _chosen_softmax(scores: Tensor, index: Tensor) -> Tensor:
    return scores.gather(1, index).softmax(-1)


def _whole_softmax(scores: Tensor, index: Tensor) -> Tensor:
    return scores.softmax(-1).gather(1, index)


def _scaled_sigmoid(scores: Tensor, index: Tensor) -> Tensor:
    weights = scores.sigmoid().gather(1, index)
    return 2.5 * weights / weights.sum(-1, keepdim=True)


WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mixtral": _chosen_softmax,
    "qwen3_moe": _chosen_softmax,
    "qwen2_moe": _whole_softmax,
    "olmoe": _whole_softmax,
    "deepseek_v3": _scaled_sigmoid,
    "gpt_oss": _chosen_softmax,
}


def model_of(family: str, **changes: Any) -> Any:
    """A random model whose gates have preferences."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SHAPE | FAMILIES.get(family, {}) | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
            if value.is_floating_point() and "rotary" not in name:
                value.add_(torch.randn(value.shape) * 0.2)
    return model.requires_grad_(False)


IDS = torch.arange(2, 62).view(3, 20)


@contextmanager
def gates_of(model: Any) -> Iterator[list[Gate]]:
    gates = take_gates(model)
    try:
        yield gates
    finally:
        for gate in gates:
            gate.close()


def outputs_of(model: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Logits, and (scores, weights, indices) of each gate."""
    seen: list[Any] = []
    modules = [getattr(block, "gate", None) or block.router for _, block in moe_blocks(model)]
    hooks = [module.register_forward_hook(lambda module, args, output: seen.append(output)) for module in modules]
    logits = model(IDS).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, model_of(request.param)


def sets(count: int, least: int = 3) -> list[Tensor]:
    """Resident sets of every size that serves a token, some of them all in one group."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(count, generator=generator) for _ in range(2)] + [torch.arange(count)]
    return [
        torch.zeros(count, dtype=torch.bool).index_fill(0, order[:size], True)
        for size in range(least, count)
        for order in drawn
    ]


def test_no_absent_moe_expert_is_chosen(made: tuple[str, Any]) -> None:
    _, model = made
    plain, free = outputs_of(model)
    with gates_of(model) as gates:
        for resident in sets(MOE_EXPERTS):
            for gate in gates:
                gate.restrict(resident)
            _, seen = outputs_of(model)
            assert len(seen) == len(gates) == 2
            assert all(bool(resident[index].all()) for _, _, index in seen)
            assert all(len(set(row)) == len(row) for _, _, index in seen for row in index.tolist())
    assert any(not bool(resident[index].all()) for resident in sets(MOE_EXPERTS) for _, _, index in free)
    assert torch.equal(outputs_of(model)[0], plain), "closed gates are the family's own"


@pytest.mark.parametrize("made", WEIGHTS, indirect=True)
def test_weights_are_the_familys_own_function_of_all_scores(made: tuple[str, Any]) -> None:
    family, model = made
    with gates_of(model) as gates:
        for gate in gates:
            gate.restrict(sets(MOE_EXPERTS)[0])
        for scores, weights, index in outputs_of(model)[1]:
            torch.testing.assert_close(weights, WEIGHTS[family](scores, index))


@pytest.mark.parametrize("made", sorted(WEIGHTS.keys() - {"deepseek_v3"}), indirect=True)
def test_the_best_residents_are_chosen_where_there_are_no_groups(made: tuple[str, Any]) -> None:
    _, model = made
    resident = sets(MOE_EXPERTS)[7]
    with gates_of(model) as gates:
        for gate in gates:
            gate.restrict(resident)
        for scores, _, index in outputs_of(model)[1]:
            expected = scores.masked_fill(~resident, -torch.inf).topk(3).indices
            assert torch.equal(index.sort().values, expected.sort().values)


def test_with_everything_resident_nothing_changes(made: tuple[str, Any]) -> None:
    _, model = made
    plain, free = outputs_of(model)
    with gates_of(model) as gates:
        for gate in gates:
            gate.restrict(torch.ones(MOE_EXPERTS, dtype=torch.bool))
        logits, seen = outputs_of(model)
        for gate in gates:
            gate.restrict(None)
        lifted = outputs_of(model)[0]
    assert torch.equal(logits, plain) and torch.equal(lifted, plain)
    for ours, theirs in zip(seen, free, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_an_observer_is_told_what_the_gate_would_choose_of_all(made: tuple[str, Any]) -> None:
    _, model = made
    _, free = outputs_of(model)
    told: list[Choice] = []
    with gates_of(model) as gates:
        gates[0].observer = told.append
        gates[0].restrict(sets(MOE_EXPERTS)[0])
        outputs_of(model)
    assert len(told) == 1 and told[0].hidden.shape == (60, 32)
    assert torch.equal(told[0].weights, free[0][1]) and torch.equal(told[0].indices, free[0][2])


def test_fewer_residents_than_a_token_takes_are_refused() -> None:
    model = model_of("mixtral")
    with gates_of(model) as gates:
        gates[1].restrict(largest(torch.arange(8.0), 2))
        with pytest.raises(BudgetError, match=r"layers\.1\.mlp\.gate: expected at least 3 .* found 2"):
            model(IDS)
        with pytest.raises(ValueError, match=r"expected the resident set as bool \[8\], found torch.float32 \[8\]"):
            gates[0].restrict(torch.ones(8))


def test_families_that_choose_in_another_way_are_refused() -> None:
    phi = model_of("phimoe", num_local_experts=MOE_EXPERTS, num_experts_per_tok=2)
    with gates_of(phi) as gates:
        gates[0].restrict(largest(torch.arange(8.0), 4))
        with pytest.raises(UnsupportedModelError, match=r"by torch\.topk, found Phimoe"):
            phi(IDS)
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2, num_experts=4
    )
    with pytest.raises(UnsupportedModelError, match=r"transformers' interface .* found SwitchTransformers"):
        take_gates(SwitchTransformersModel(config))
    with pytest.raises(UnsupportedModelError, match="expected a model with MoE experts, found none"):
        take_gates(model_of("llama"))


# --- importance ---------------------------------------------------------------------------------------------------


def test_importance_is_the_sum_that_the_paper_has(made: tuple[str, Any]) -> None:
    _, model = made
    blocks = [block for _, block in moe_blocks(model)]
    told: list[list[Choice]] = [[], []]
    with gates_of(model) as gates:
        counted = [Importance(weight_norms(block.experts), decay=0.5) for block in blocks]
        for gate, own, seen in zip(gates, counted, told, strict=True):
            gate.observer = lambda choice, own=own, seen=seen: (own.add(choice), seen.append(choice))
        for _ in range(2):
            model(IDS)
            for own in counted:
                own.fade()
    for own, (first, second), block in zip(counted, told, blocks, strict=True):
        expected = torch.zeros(MOE_EXPERTS)
        for choice, share in ((first, 0.5), (second, 1.0)):
            for x, row, weights in zip(*choice, strict=True):
                for e, weight in zip(row.tolist(), weights, strict=True):
                    norm = torch.cat([stack[e].flatten() for stack in block.experts.parameters()]).norm()
                    expected[e] += share * x.norm() * weight * norm
        torch.testing.assert_close(own.values, expected, rtol=1e-4, atol=1e-5)


def test_a_profile_is_of_the_outputs_of_single_moe_experts() -> None:
    model = model_of("mixtral")
    experts = model.model.layers[1].mlp.experts
    calls: list[Any] = []
    experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with profile_outputs(model) as profiles:
        model(IDS)
    model(IDS)
    hidden, index, weights = calls[0]
    tokens, inputs, outputs = torch.zeros(3, MOE_EXPERTS, dtype=torch.float64)
    for x, row, own in zip(hidden, index.tolist(), weights, strict=True):
        for e, weight in zip(row, own, strict=True):
            gate, up = (experts.gate_up_proj[e] @ x).chunk(2)
            y = experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
            tokens[e] += 1
            inputs[e] += weight * x.norm()
            outputs[e] += weight * y.norm()
    assert len(calls) == 2, "a profile ends with its context, and its own calls run no hooks"
    assert torch.equal(profiles[1].tokens, tokens)
    torch.testing.assert_close(profiles[1].inputs, inputs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(profiles[1].outputs, outputs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(profiles[1].gain, (outputs / inputs).float(), rtol=1e-4, atol=1e-6)


# --- resident sets ------------------------------------------------------------------------------------------------


def virtual(gates: list[Gate], sizes: tuple[int, int] = (10, 10), least: int = 0) -> VirtualExperts:
    importance = [Importance(torch.ones(MOE_EXPERTS)) for _ in gates]
    start = [largest(torch.arange(8.0), 3)] * 2
    return VirtualExperts(gates, importance, start, sizes=sizes, least=least)


def test_virtual_experts_become_those_that_are_asked_for() -> None:
    model = model_of("qwen3_moe")
    free = outputs_of(model)[1]
    with gates_of(model) as gates:
        held = virtual(gates)
        for _ in range(12):
            _, seen = outputs_of(model)
            for own, (_, _, index) in zip(held.resident, seen, strict=True):
                assert bool(own[index].all())
            held.take(held.propose(cap=20))
        assert held.propose(cap=20) == []
    mass = torch.zeros(MOE_EXPERTS).index_add_(0, free[0][2].flatten(), free[0][1].flatten())
    # All tokens of the first layer have inputs of nearly one norm, so its importance is nearly the sum of weights.
    assert set(held.resident[0].nonzero().flatten().tolist()) == set(mass.topk(3).indices.tolist())
    assert all(int(own.sum()) == 3 for own in held.resident)


def test_swaps_keep_to_the_cap_and_the_largest_gain_goes_first() -> None:
    model = model_of("qwen3_moe")
    hidden = torch.ones(1, 32)

    def told(held: VirtualExperts) -> VirtualExperts:
        held._importance[0].add(Choice(hidden, torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.3, 0.2]])))
        held._importance[1].add(Choice(hidden, torch.tensor([[3, 6, 7]]), torch.tensor([[0.8, 0.1, 0.1]])))
        return held

    with gates_of(model) as gates:
        everything = told(virtual(gates)).propose(cap=1000)
        assert everything[:2] == [Swap(1, 5, 3), Swap(0, everything[1].leaves, 0)]
        assert {swap.enters for swap in everything if swap.layer == 0} == {0, 1, 2}
        assert told(virtual(gates)).propose(cap=19) == everything[:1]
        assert told(virtual(gates)).propose(cap=9) == []
        dear = told(virtual(gates, sizes=(10, 1000))).propose(cap=19)
        assert [swap.layer for swap in dear] == [0]
        assert virtual(gates).propose(cap=1000) == [], "nothing was asked"
        few = told(virtual(gates, least=2)).propose(cap=1000)
        assert sorted(few) == sorted(everything[:2]), "one of three may leave each layer"
        assert told(virtual(gates, least=3)).propose(cap=1000) == []


losses = st.lists(st.integers(0, 50), min_size=3, max_size=5).map(lambda some: sorted(map(float, some), reverse=True))


@given(st.data())
def test_dividing_is_as_good_as_trying_everything(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 3))
    curves = [data.draw(losses) for _ in range(layers)]
    sizes = [data.draw(st.sampled_from([2, 4, 6])) for _ in range(layers)]
    budget = data.draw(st.integers(0, 60))
    allowed = [
        counts
        for counts in itertools.product(*(range(1, len(curve)) for curve in curves))
        if sum(n * size for n, size in zip(counts, sizes, strict=True)) <= budget
    ]
    if not allowed:
        with pytest.raises(BudgetError):
            divide(curves, sizes, budget, least=1)
        return
    found = divide(curves, sizes, budget, least=1)
    assert tuple(found) in allowed

    def total(counts: Any) -> float:
        return sum(curve[n] for curve, n in zip(curves, counts, strict=True))

    assert total(found) == min(map(total, allowed))


def test_tails_are_what_the_largest_leave_out() -> None:
    assert tail(torch.tensor([1.0, 4.0, 3.0, 2.0])) == pytest.approx([1.0, 0.6, 0.3, 0.1, 0.0])
