"""What continuous batching relies on in transformers: it is there, and where it is not, nothing starts."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, LogitsProcessorList
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import (
    FullAttentionCacheAllocator,
    SlidingAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import FIFOScheduler, Scheduler

from families import config_of, save_random
from meswitch.batching import bridge, compatibility
from meswitch.batching.attention import PAGED, AttentionPlan, paged_attention, plan_attention
from meswitch.batching.bridge import INTERNALS
from meswitch.batching.compatibility import check_transformers, run_checks
from meswitch.batching.sampler import RequestSampler, SamplingState
from meswitch.batching.signatures import CALLS, FIELDS, check_signatures
from meswitch.batching.step import CacheAccess, PagedStep
from meswitch.engine.engine import Engine
from meswitch.errors import TransformersVersionError, UnsupportedModelError

METHODS = [where for where in CALLS if "." in where]
OWNERS = {owner.__name__: owner for owner in INTERNALS}
Patch = pytest.MonkeyPatch


def test_the_installed_version_passes() -> None:
    state = torch.get_rng_state()
    check_transformers()
    run_checks()
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_looked_at_once(monkeypatch: Patch) -> None:
    check_transformers()
    looked: list[Any] = []
    monkeypatch.setattr(compatibility, "run_checks", looked.append)
    check_transformers()
    assert not looked
    monkeypatch.setattr(compatibility.transformers, "__version__", "5.99.0")
    check_transformers()
    assert looked
    compatibility._checked.discard(("5.99.0", "cpu"))


@pytest.mark.parametrize("where", METHODS)
def test_a_function_that_is_gone_is_named(where: str, monkeypatch: Patch) -> None:
    owner, name = where.split(".")
    if name in ("__init__", "__call__"):
        monkeypatch.setattr(OWNERS[owner], name, lambda: None)
    else:
        for holder in OWNERS[owner].__mro__:
            if name in vars(holder):
                monkeypatch.delattr(holder, name)
    with pytest.raises(TransformersVersionError, match=rf"transformers {transformers.__version__} .*\.{name}"):
        check_signatures()


@pytest.mark.parametrize("where", METHODS)
def test_a_function_that_takes_more_is_named(where: str, monkeypatch: Patch) -> None:
    owner, name = where.split(".")

    def more(*, something_new: Any) -> None: ...

    monkeypatch.setattr(OWNERS[owner], name, more)
    with pytest.raises(TransformersVersionError, match=where):
        check_signatures()


@pytest.mark.parametrize("where", [where for where, call in CALLS.items() if call.replaced])
def test_what_stands_in_for_a_function_takes_all_of_its_arguments(where: str, monkeypatch: Patch) -> None:
    owner, name = where.split(".")
    names = [f"argument_{i}" for i in range(CALLS[where].positional)] + CALLS[where].keywords.split()
    wider = eval(f"lambda {', '.join([*names, 'something_new=None'])}: None")
    monkeypatch.setattr(OWNERS[owner], name, wider)
    with pytest.raises(TransformersVersionError, match=rf"{where}.*takes more"):
        check_signatures()


def test_a_name_that_cannot_be_imported_is_said(monkeypatch: Patch) -> None:
    monkeypatch.delattr(transformers.generation.continuous_batching.utils, "find_head_dim")
    specification = importlib.util.spec_from_file_location("another_bridge", bridge.__file__)
    assert specification is not None and specification.loader is not None
    with pytest.raises(TransformersVersionError, match="find_head_dim"):
        specification.loader.exec_module(importlib.util.module_from_spec(specification))


@pytest.mark.parametrize(("owner", "field"), FIELDS)
def test_a_field_that_is_gone_is_named(owner: Any, field: str, monkeypatch: Patch) -> None:
    for holder in owner.__mro__:
        if field in vars(holder):
            monkeypatch.delattr(holder, field)
    with pytest.raises(TransformersVersionError, match=field):
        check_signatures()


# what no signature shows: each of these changes would go unnoticed, and a request would be answered wrongly


def search_elsewhere(monkeypatch: Patch) -> None:
    """The scheduler looks for prefixes by another way."""
    infer = Scheduler._infer_request_tokens

    def other(self: Any, *args: Any) -> Any:
        del self.cache.search_prefix_match
        return infer(self, *args)

    def unless_patched(self: Any, *args: Any) -> Any:
        return other(self, *args) if "search_prefix_match" in vars(self.cache) else infer(self, *args)

    monkeypatch.setattr(Scheduler, "_infer_request_tokens", unless_patched)


def mark_elsewhere(monkeypatch: Patch) -> None:
    """The cache remembers pages by another way."""

    def mark(self: Any, state: Any, complete_blocks: dict[str, int]) -> None:
        ids = state.initial_tokens + state.generated_tokens
        for name, count in complete_blocks.items():
            allocator = self.cache_allocators[name]
            type(allocator).mark_complete_blocks(allocator, state.request_id, ids, count)

    monkeypatch.setattr(PagedAttentionCache, "mark_complete_blocks", mark)


def both_elsewhere(monkeypatch: Patch) -> None:
    search_elsewhere(monkeypatch)
    mark_elsewhere(monkeypatch)


def other_order_of_a_batch(monkeypatch: Patch) -> None:
    schedule = FIFOScheduler.schedule_batch

    def turned(self: Any, token_budget: int, cache_budget: int) -> Any:
        requests, *rest = schedule(self, token_budget, cache_budget)
        return (*rest, requests)

    monkeypatch.setattr(FIFOScheduler, "schedule_batch", turned)


def other_requests_in_a_batch(monkeypatch: Patch) -> None:
    prepare = ContinuousBatchingIOs.prepare_batch_tensors

    @wraps(prepare)
    def turned(self: Any, requests_in_batch: list[Any], *args: Any, **kwargs: Any) -> None:
        prepare(self, requests_in_batch[::-1], *args, **kwargs)

    monkeypatch.setattr(ContinuousBatchingIOs, "prepare_batch_tensors", turned)


def other_order_of_rows(monkeypatch: Patch) -> None:
    """As many rows of logits, those of requests without a new token first."""
    kwargs_of = ContinuousBatchingIOs.get_model_kwargs

    def turned(self: Any, use_padding: bool = False) -> Any:
        kwargs = kwargs_of(self, use_padding)
        idle = sum(not entry.has_new_token for entry in self.requests_in_batch)
        kwargs["logits_indices"] = kwargs["logits_indices"].roll(idle)
        return kwargs

    monkeypatch.setattr(ContinuousBatchingIOs, "get_model_kwargs", turned)


def other_order_of_tokens(monkeypatch: Patch) -> None:
    """The last request's tokens come first, and everything that transformers itself knows of agrees with that."""
    forward = transformers.Gemma2ForCausalLM.forward

    def turned(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        return forward(self, input_ids.flip(1), **kwargs)

    monkeypatch.setattr(transformers.Gemma2ForCausalLM, "forward", turned)


def more_rows(monkeypatch: Patch) -> None:
    kwargs_of = ContinuousBatchingIOs.get_model_kwargs

    def padded(self: Any, use_padding: bool = False) -> Any:
        kwargs = kwargs_of(self, use_padding)
        kwargs["logits_indices"] = torch.cat((kwargs["logits_indices"], kwargs["logits_indices"][:1]))
        return kwargs

    monkeypatch.setattr(ContinuousBatchingIOs, "get_model_kwargs", padded)


def sampler_left_out(monkeypatch: Patch) -> None:
    build = ModelRunner.__init__

    def without(self: Any, *args: Any, logit_processor: Any, **kwargs: Any) -> None:
        build(self, *args, logit_processor=ContinuousBatchingLogitsProcessorList(LogitsProcessorList()), **kwargs)

    monkeypatch.setattr(ModelRunner, "__init__", without)


def sampler_not_asked(monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        ContinuousBatchingLogitsProcessorList, "__call__", lambda self, input_ids, scores, logits_processor_args: scores
    )


def inputs_elsewhere(monkeypatch: Patch) -> None:
    """A step is described to the model by a function of another name."""

    def step(self: Any, model: Any) -> None:
        inputs = self.inputs_and_outputs
        self.model_runner.compute_batch(model, type(inputs).get_model_kwargs(inputs))

    monkeypatch.setattr(compatibility.PagedBatch, "run", lambda self: step(self._processor, self.model))


def another_attention(monkeypatch: Patch) -> None:
    """The step runs with an attention that was not asked for."""
    monkeypatch.setitem(AttentionInterface._global_mapping, PAGED, transparent)


def transparent(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    return query.transpose(1, 2), None


def window_renamed(monkeypatch: Patch) -> None:
    build = SlidingAttentionCacheAllocator.__init__

    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.window = self.__dict__.pop("sliding_window")

    monkeypatch.setattr(SlidingAttentionCacheAllocator, "__init__", renamed)
    monkeypatch.setattr(SlidingAttentionCacheAllocator, "__getattr__", hidden_window, raising=False)


def hidden_window(self: Any, name: str) -> Any:
    """The allocator's own functions still find their window; nobody else does."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    if name == "sliding_window" and "transformers" in frame.f_back.f_code.co_filename:
        return self.window
    raise AttributeError(name)


def window_without_effect(monkeypatch: Patch) -> None:
    monkeypatch.setattr("meswitch.batching.bridge._window", lambda kind, allocator: None)


def other_lengths(monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        SlidingAttentionCacheAllocator, "get_seqlen_k", lambda self, past_length, query_length: query_length
    )


def softcap_left_out(monkeypatch: Patch) -> None:
    monkeypatch.setattr(AttentionInterface, "get_interface", capless(AttentionInterface.get_interface))


def capless(get: Callable[..., Any]) -> Callable[..., Any]:
    def without(self: Any, name: str, default: Any) -> Any:
        function = get(self, name, default)
        return (lambda *args, softcap=None, **kwargs: function(*args, **kwargs)) if name == PAGED else function

    return without


def waiting_flag_renamed(monkeypatch: Patch) -> None:
    reset = Scheduler.reset

    def renamed(self: Any) -> None:
        reset(self)
        del self.block_new_requests

    monkeypatch.setattr(Scheduler, "reset", renamed)


def waiting_flag_without_effect(monkeypatch: Patch) -> None:
    schedule = FIFOScheduler.schedule_batch

    def admitting(self: Any, token_budget: int, cache_budget: int) -> Any:
        blocked, self.block_new_requests = self.block_new_requests, False
        batch = schedule(self, token_budget, cache_budget)
        self.block_new_requests = blocked
        return batch

    monkeypatch.setattr(FIFOScheduler, "schedule_batch", admitting)


def cancelled_requests_stay(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Scheduler, "clear_cancelled_requests", lambda self: [])


def tokens_by_the_router_alone(monkeypatch: Patch) -> None:
    """Tokens go to the output router and nowhere else."""
    update = RequestState.update_and_check_completion

    def delivered(self: Any, token_id: int, logprob: float | None) -> bool:
        finished = update(self, token_id, logprob)
        self.generated_tokens.clear()
        return finished

    monkeypatch.setattr(RequestState, "update_and_check_completion", delivered)


def errors_by_the_router_alone(monkeypatch: Patch) -> None:
    """A failed request is reported to the output router and nowhere else."""

    def prepare(self: Any) -> bool:
        self.output_router.fail_and_deliver(None, ValueError("a bad request"))
        return False

    monkeypatch.setattr(compatibility.PagedBatch, "prepare", lambda self: prepare(self._processor))


def router_elsewhere(monkeypatch: Patch) -> None:
    build = ContinuousBatchingManager.__init__

    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.router = self.__dict__.pop("output_router")

    monkeypatch.setattr(ContinuousBatchingManager, "__init__", renamed)


def processors_elsewhere(monkeypatch: Patch) -> None:
    build = ContinuousBatchingManager.__init__

    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.logits_processors = self.__dict__.pop("logit_processor")

    monkeypatch.setattr(ContinuousBatchingManager, "__init__", renamed)


def larger_cache(monkeypatch: Patch) -> None:
    build = FullAttentionCacheAllocator._before_cache_tensor_init

    def roomy(self: Any, **kwargs: Any) -> None:
        build(self, **{**kwargs, "bytes_per_page": 3 * kwargs["bytes_per_page"]})

    monkeypatch.setattr(FullAttentionCacheAllocator, "_before_cache_tensor_init", roomy)


def end_of_sequence_elsewhere(monkeypatch: Patch) -> None:
    own = transformers.GenerationMixin._get_logits_processor

    def renamed(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        generation_config._eos_token_tensor = None
        return own(self, generation_config, *args, **kwargs)

    monkeypatch.setattr(transformers.GenerationMixin, "_get_logits_processor", renamed)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (search_elsewhere, "search_prefix_match"),
        (mark_elsewhere, "mark_complete_blocks"),
        (both_elsewhere, "search_prefix_match"),
        (other_order_of_a_batch, "not scheduled"),
        (other_requests_in_a_batch, "requests first"),
        (other_order_of_rows, "logits of a packed step are"),
        (other_order_of_tokens, "tokens are not in the order"),
        (more_rows, "a row of logits for every request"),
        (sampler_left_out, "logits processors"),
        (sampler_not_asked, "of 0 rows of logits"),
        (inputs_elsewhere, "does not receive what a step hands"),
        (another_attention, "an attention of their own"),
        (window_renamed, "sliding_window"),
        (window_without_effect, "a window of 6, and its config says None"),
        (other_lengths, "logits of a packed step are"),
        (softcap_left_out, "logits of a packed step are"),
        (waiting_flag_renamed, "block_new_requests"),
        (waiting_flag_without_effect, "block_new_requests blocks nobody"),
        (cancelled_requests_stay, "cancelled request"),
        (tokens_by_the_router_alone, "IndexError"),
        (errors_by_the_router_alone, "a bad request"),
        (router_elsewhere, "output_router"),
        (processors_elsewhere, "logit_processor"),
        (larger_cache, "sectors of"),
        (end_of_sequence_elsewhere, "end-of-sequence"),
    ],
)
def test_a_change_is_noticed(change: Callable[[Patch], None], says: str, monkeypatch: Patch) -> None:
    change(monkeypatch)
    with pytest.raises(TransformersVersionError, match=rf"(?s)transformers {transformers.__version__} .*({says})"):
        run_checks()


def test_an_engine_does_not_start_on_another_transformers(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(compatibility, "_checked", set())
    monkeypatch.delattr(OutputRouter, "deliver_batch")
    with pytest.raises(TransformersVersionError, match="deliver_batch"):
        Engine(save_random(tmp_path, config_of("llama")))


# what attention over the paged cache refuses


class Layer:
    layer_idx = 0
    config: Any = None


class Bidirectional(Layer):
    is_causal = False


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"attention_mask": torch.zeros(1, 1, 1, 1)}, "mask of its own"),
        ({"s_aux": torch.zeros(2)}, "'s_aux'"),
        ({"position_bias": torch.zeros(1)}, "'position_bias'"),
        ({"block_table": torch.zeros(1)}, "'block_table'"),
        ({"is_causal": False}, "later ones"),
        ({"dropout": 0.1}, "drops"),
        ({"paged_step": None}, "does not receive"),
    ],
)
def test_attention_refuses_what_it_does_not_know(more: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"attention_mask": None, "paged_step": PagedStep({}, {}), **more}
    tensors = [torch.zeros(1, 2, 1, 8)] * 3
    with pytest.raises(UnsupportedModelError, match=rf"Layer cannot run .*{says}"):
        paged_attention(Layer(), *tensors, scaling=1.0, **given)


def test_attention_refuses_a_module_that_looks_ahead() -> None:
    """Whatever a step says: there is one keyword for all layers."""
    tensors = [torch.zeros(1, 2, 1, 8)] * 3
    with pytest.raises(UnsupportedModelError, match=r"Bidirectional cannot run .*later ones"):
        paged_attention(Bidirectional(), *tensors, None, 1.0, is_causal=True, paged_step=PagedStep({}, {}))


def test_a_model_with_its_own_mask_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"DogeAttention.*mask"):
        Engine(save_random(tmp_path, config_of("doge")))


def test_a_layer_that_goes_past_the_paged_attention_is_refused_at_start(tmp_path: Path, monkeypatch: Patch) -> None:
    forward = transformers.models.llama.modeling_llama.LlamaAttention.forward

    def past(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layer_idx == 1:
            self.config = copy.copy(self.config)
            self.config._attn_implementation = "sdpa"
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", past)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*attention of their own"):
        Engine(save_random(tmp_path, config_of("llama")))


@pytest.mark.parametrize(("window", "longest", "refused"), [(8, 16, True), (16, 16, False), (None, 16, True)])
def test_a_window_counts_that_the_model_does_not_apply(window: int | None, longest: int, refused: bool) -> None:
    """Planned windows that the attention is not told of; one as long as the context hides nothing."""
    layer = Layer()
    layer.config = SimpleNamespace(max_position_embeddings=longest)
    given = None if window else 4
    plan = AttentionPlan([], torch.empty(0), torch.empty(0), window)
    step = PagedStep({0: SimpleNamespace(index=0)}, {0: plan})
    tensors = [torch.zeros(1, 2, 1, 8)] * 3
    says = rf"window of {given}, and its config says {window}" if refused else "has no attribute 'update'"
    with pytest.raises(UnsupportedModelError if refused else AttributeError, match=says):
        paged_attention(layer, *tensors, None, scaling=1.0, sliding_window=given, paged_step=step)


# nothing in a step waits for the device: a tensor on the meta device has no value that could be asked for


def test_planning_attention_asks_the_device_for_nothing() -> None:
    meta = torch.device("meta")
    queries, keys = [3, 1, 1, 1], [3, 9, 12, 90]
    access = CacheAccess(
        queries,
        keys,
        [0, 8, 11, 89],
        torch.empty(4, dtype=torch.int32, device=meta),
        torch.empty(sum(keys), dtype=torch.int64, device=meta),
        torch.empty(sum(queries), dtype=torch.int64, device=meta),
        padding=0,
        window=8,
        dtype=torch.float32,
    )
    plan = plan_attention(access)
    assert [group.requests for group in plan.groups] == [1, 2, 1]
    assert plan.read.device == meta and all(group.mask is None or group.mask.is_meta for group in plan.groups)


def test_sampling_asks_the_device_for_nothing() -> None:
    sampler = RequestSampler()
    state = RequestState(request_id="a", initial_tokens=[1, 2])
    processors = LogitsProcessorList([lambda ids, scores: scores + ids.sum()])  # type: ignore[list-item]
    sampler.states = {"a": SamplingState(processors, 40)}
    assert sampler.process(torch.empty(1, 50, device="meta"), [state]).is_meta


@pytest.mark.parametrize("module", ["attention", "bridge", "cache", "sampler", "scheduler", "step"])
def test_no_file_of_a_step_reads_a_tensor(module: str) -> None:
    source = Path(bridge.__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    assert not re.search(r"\.(tolist|item|cpu|numpy)\(|\bis_cpu\b", source)


def test_a_generator_moves_to_the_logits_with_its_seed() -> None:
    state = SamplingState(LogitsProcessorList(), 50, torch.Generator().manual_seed(7))
    assert state.generator_on(torch.device("cpu")) is state.generator
