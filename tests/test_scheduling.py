"""The KV cache's size, the sampler's rows, and prefixes kept apart by expert."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LogitsProcessorList
from transformers.generation.continuous_batching.requests import RequestState

from families import config_of
from meswitch.batching.attention import PAGED, plan_attention
from meswitch.batching.bridge import PagedBatch
from meswitch.batching.cache import cache_geometry, plan_cache
from meswitch.batching.prefill import LEAST_TOKENS, PrefillChunk
from meswitch.batching.sampler import RequestSampler, SamplingState
from meswitch.batching.scheduler import ExpertScheduler, RequestSlot
from meswitch.errors import BudgetError, UnsupportedModelError


@given(st.integers(200_000, 50_000_000), st.sampled_from([8, 64, 512]), st.sampled_from(["llama", "gemma3_text"]))
def test_plan_stays_within_its_budget(budget: int, tokens: int, family: str) -> None:
    config = config_of(family)
    try:
        plan = plan_cache(config, torch.float32, budget, max_batch_tokens=tokens)
    except BudgetError:
        assert cache_geometry(config, torch.float32).need(1, tokens) > budget
        return
    assert plan.blocks >= 1
    assert plan.nbytes <= budget
    assert plan.blocks * cache_geometry(config, torch.float32).block_bytes <= budget


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", PAGED])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("budget", [2**20, 2**22])
def test_planned_bytes_are_those_that_are_allocated(family: str, attention: str, dtype: str, budget: int) -> None:
    """For layers of one kind and of two, with and without masks."""
    config = config_of(family, **({"sliding_window": 16} if family == "mistral" else {}))
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    if attention == "eager":
        model.set_attn_implementation("eager")
    plan = plan_cache(config, model.dtype, budget, max_batch_tokens=48, masks=attention != PAGED)
    batch = PagedBatch(
        model,
        page_size=plan.page_size,
        blocks=plan.blocks,
        max_batch_tokens=48,
        scheduler=ExpertScheduler,
        sampler=RequestSampler(),
        attention=PAGED if attention == PAGED else None,
        plan_attention=plan_attention if attention == PAGED else None,
    )
    assert plan.nbytes == pytest.approx(batch.nbytes, rel=0.01)
    assert plan.nbytes > 0.7 * budget
    plan.check(batch.nbytes)


def test_need_and_plan_agree() -> None:
    geometry = cache_geometry(config_of("llama"), torch.float32)
    budget = geometry.need(320, 64)
    assert plan_cache(config_of("llama"), torch.float32, budget, max_batch_tokens=64).blocks == 10


def test_budget_too_small_says_the_sizes() -> None:
    with pytest.raises(BudgetError, match=r"kv_budget: expected at least \d+ bytes.*found 1000 bytes"):
        plan_cache(config_of("llama"), torch.float32, 1000, max_batch_tokens=512)


def test_layers_that_continuous_batching_does_not_know() -> None:
    config = SimpleNamespace(model_type="odd", layer_types=["linear_attention"], num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"odd.*linear_attention"):
        cache_geometry(config, torch.float32)


def scheduler_with(cache: Any, slots: dict[str, RequestSlot]) -> ExpertScheduler:
    scheduler = ExpertScheduler(cache, None, 8)
    scheduler.slots = slots
    return scheduler


def test_prefixes_are_salted_by_expert() -> None:
    searched: list[list[int]] = []
    cache: Any = SimpleNamespace(
        search_prefix_match=lambda request_id, ids: searched.append(ids) or 0, cache_allocators={}
    )
    scheduler_with(
        cache, {"base": RequestSlot(), "a": RequestSlot(0, 1), "b": RequestSlot(1, 2), "a2": RequestSlot(0, 1)}
    )
    for request in ("base", "a", "b", "a2"):
        cache.search_prefix_match(request, [5, 6, 7])
    base, a, b, again = searched
    assert base == [5, 6, 7]
    assert a == again and a != b and a[0] < 0 and b[0] < 0
    cache.search_prefix_match("a", [4, 6, 7])
    assert searched[-1] != a


def test_numbers_of_prefixes_are_dropped_with_their_expert_and_never_used_again() -> None:
    cache: Any = SimpleNamespace(search_prefix_match=lambda request_id, ids: ids, cache_allocators={})
    slots: dict[str, RequestSlot] = {}
    scheduler = scheduler_with(cache, slots)
    seen = set()
    for salt in range(1, 10_001):
        slots["a"] = RequestSlot(0, salt)
        seen.add(cache.search_prefix_match("a", [5, 6])[0])
        scheduler.forget(salt)
    assert len(seen) == 10_000 and not scheduler._first_ids


def test_rows_of_a_step() -> None:
    cache: Any = SimpleNamespace(search_prefix_match=None, cache_allocators={})
    scheduler = scheduler_with(cache, {"a": RequestSlot(0, 1), "base": RequestSlot(), "b": RequestSlot(1, 2)})
    entries = [("a", 1, True), ("b", 3, False), ("base", 2, True)]
    scheduler.step = [
        SimpleNamespace(state=SimpleNamespace(request_id=name), query_length=length, has_new_token=new)  # type: ignore[misc]
        for name, length, new in entries
    ]
    assert scheduler.token_slots() == [0, 1, 1, 1, -1, -1]
    assert scheduler.kept_slots() == [0, -1, -1]  # a row for each request, those with a new token first


def test_a_piece_of_a_prompt_is_as_large_as_a_step_bears() -> None:
    """On a machine where a token of a prompt takes a hundredth of a decode step."""
    chunk = PrefillChunk(512)

    def step(decoding: int, prompt: int) -> float:
        seconds = (1.0 if decoding else 0.0) + 0.01 * prompt
        chunk.learn(decoding, prompt, seconds)
        return seconds

    step(0, 512)
    step(2, 512)
    assert chunk.tokens == 512  # nothing to compare with yet
    for _ in range(5):
        step(2, 0)
    assert [step(2, chunk.tokens) for _ in range(6)] == pytest.approx([6.12, 3.56, 2.28, 2.28, 2.28, 2.28])
    step(2, 3)  # the end of a prompt says nothing of what a step bears
    assert chunk.tokens == 128
    chunk.learn(2, 128, 1.2)  # on a quicker machine
    assert chunk.tokens == 256
    for _ in range(20):
        chunk.learn(1, chunk.tokens, 100.0)
    assert chunk.tokens == LEAST_TOKENS
    for _ in range(20):
        chunk.learn(1, chunk.tokens, 0.5)
    assert chunk.tokens == chunk.most


def test_small_steps_stay_small() -> None:
    chunk = PrefillChunk(8)
    chunk.learn(1, 0, 1.0)
    for _ in range(5):
        chunk.learn(1, chunk.tokens, 100.0)
    assert chunk.tokens == 8


def entry(name: str) -> Any:
    return SimpleNamespace(state=RequestState(request_id=name, initial_tokens=[1, 2]))


def sample(states: dict[str, SamplingState], scores: torch.Tensor) -> list[int]:
    sampler = RequestSampler()
    sampler.states = states
    sampler.prepare_tensor_args([entry(name) for name in states])
    return sampler(scores.clone(), torch.zeros(len(states), dtype=torch.int32)).argmax(dim=-1).tolist()


def test_processors_read_a_long_answer_without_a_copy_of_it() -> None:
    state, device = SamplingState(LogitsProcessorList(), 50), torch.device("cpu")
    request = SimpleNamespace(initial_tokens=[7, 8], generated_tokens=[])
    places = set()
    for token in range(500):
        request.generated_tokens.append(token)
        ids = state.ids(request, device)
        assert ids.tolist() == [[7, 8, *range(token + 1)]]
        places.add(ids.data_ptr())
    assert len(places) < 5
    request.initial_tokens, request.generated_tokens = [7, 8, *range(500)], [500]  # it waited, and begins again
    assert state.ids(request, device).tolist() == [[7, 8, *range(501)]]


def test_each_row_draws_for_itself() -> None:
    scores = torch.zeros(3, 50)
    scores[0, 7] = 1.0

    def draw(seed: int | None) -> SamplingState:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return SamplingState(LogitsProcessorList(), 50, generator)

    greedy, one, two = sample({"g": draw(None), "s": draw(3), "t": draw(4)}, scores)
    assert greedy == 7
    assert sample({"t": draw(4), "s": draw(3)}, scores[1:]) == [two, one]


def test_tokens_that_a_model_does_not_know_are_never_chosen() -> None:
    scores = torch.zeros(2, 50)
    scores[:, 45] = 9.0
    sampled = SamplingState(LogitsProcessorList(), 40, torch.Generator().manual_seed(0))
    assert max(sample({"g": SamplingState(LogitsProcessorList(), 40), "s": sampled}, scores)) < 40
