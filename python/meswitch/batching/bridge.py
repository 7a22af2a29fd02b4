"""transformers' continuous batching, as the rest of the package sees it. No other file imports its internals.

    PagedBatch          requests of one model in one batch, a step at a time: add, prepare, run, update, cancel
    Scheduler           base of the scheduler: which requests run in a step; subclasses say who may share prefix pages
    LogitsProcessor     base of the sampler: sees the logits of a step, a row a request

What an attention function is told of a step is in `step`, what is compared at start in `signatures`.

Some of what is used here is private, and some functions are replaced on instances. Whatever could change without an
exception is looked at: names when something is replaced, counts in every step, and results by `compatibility`, once a
process. Each failure is a `TransformersVersionError`.

Threads: everything runs on the thread that made the `PagedBatch`. Memory: the cache and a step's tensors are
transformers'; they are freed with the `PagedBatch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel

from meswitch.batching.step import STEP, CacheAccess, NewToken, PagedStep
from meswitch.errors import TransformersVersionError, UnsupportedModelError


def changed(what: str) -> TransformersVersionError:
    """The error for something that this version of transformers does otherwise than expected."""
    return TransformersVersionError(
        f"transformers {transformers.__version__} cannot be used for continuous batching: {what}",
        hint="install a version that meswitch was tested with: pip install 'transformers>=5.22,<5.25'",
    )


try:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.cache import (
        ATTN_TYPE_TO_ALLOCATOR,
        PagedAttentionCache,
        group_layers_by_attn_type,
    )
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
        ContinuousBatchingLogitsProcessorList,
    )
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor, OutputRouter
    from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
    from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
    from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
    from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads
except ImportError as error:
    raise changed(str(error)) from error

FULL, SLIDING = "full_attention", "sliding_attention"
ScheduledRequest = FutureRequestState


# models


def layers_by_attention(config: Any) -> dict[str, list[int]]:
    """The layers of each kind of attention. Raises `ValueError` for another kind than full and sliding."""
    layers: dict[str, list[int]] = group_layers_by_attn_type(config)
    unknown = layers.keys() - {FULL, SLIDING}
    if unknown:
        raise ValueError(f"Invalid layer type: {sorted(unknown)[0]}")
    return layers


def key_value_shape(config: Any) -> tuple[int, int]:
    """Key heads and their width. Raises `ValueError` where the text config has neither."""
    return find_num_key_value_heads(config), find_head_dim(config)


# what subclasses decide


class Scheduler(FIFOScheduler):  # type: ignore[misc,unused-ignore]
    """First in, first out. `step` holds the requests of the step that was scheduled last, in the order of their tokens.
    `prompt_tokens`: the most tokens of prompts in a step that others decode in, `None` for no other bound than the
    step's own.

    Requests share pages of the cache where their token ids start alike; `prefix_ids` may give other ids to look for.
    """

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int) -> None:
        self.step: list[ScheduledRequest] = []
        self.prompt_tokens: int | None = None
        super().__init__(cache, safety_margin, max_requests_per_batch)
        if not hasattr(self, "block_new_requests"):
            raise changed("its scheduler has no block_new_requests")
        self._replace_prefix_lookup(cache)

    def _replace_prefix_lookup(self, cache: Any) -> None:
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda request_id, ids: search(request_id, self.prefix_ids(request_id, ids))
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._marking(allocator.mark_complete_blocks)

    def _marking(self, mark: Callable[[str, list[int], int], None]) -> Callable[[str, list[int], int], None]:
        return lambda request_id, ids, count: mark(request_id, self.prefix_ids(request_id, ids), count)

    def prefix_ids(self, request_id: str, ids: list[int]) -> list[int]:
        """As many ids as `ids`: those by which the request's pages are found again."""
        return ids

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        decoding = sum(state.status == RequestStatus.DECODING for state in self.active_requests.values())
        if decoding and self.prompt_tokens is not None:
            token_budget = min(token_budget, decoding + self.prompt_tokens)
        batch = super().schedule_batch(token_budget, cache_budget)
        self.step = batch[0] or []
        return batch

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        if cancelled:  # as when a request finishes: its blocks are free again
            self.block_new_requests = False
        return cancelled


class LogitsProcessor(ContinuousBatchingLogitsProcessor):
    """Subclasses change a step's logits in `process`; the highest score of a row is the request's next token."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the base class's own declaration
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._requests: list[RequestState] = []
        self._device = torch.device("cpu")

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        self._device = int32_tensor.device
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[ScheduledRequest]) -> Tensor:
        self._requests = [entry.state for entry in requests_with_new_token]
        return torch.zeros(len(self._requests), dtype=torch.int32, device=self._device)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return self.process(scores, self._requests)

    def process(self, scores: Tensor, requests: Sequence[RequestState]) -> Tensor:
        """`scores float32 [rows, vocabulary]`: a row for each of `requests`; further rows belong to nobody."""
        raise NotImplementedError


# the batch


def _window(kind: str, allocator: Any) -> int | None:
    if kind == FULL:
        return None
    window = getattr(allocator, "sliding_window", None)
    if not isinstance(window, int):
        raise changed(f"the cache of {kind} has no sliding_window")
    return window


class _NoRouter:
    """In place of transformers' output router: tokens are taken from the step, so finished answers go nowhere."""

    def deliver(self, output: Any) -> None: ...

    def deliver_batch(self, outputs: Any) -> None: ...

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        raise error  # else nobody would hear of it


class PagedBatch:
    """Requests of one model in one batch over a paged cache of keys and values, on the caller's thread.

    `blocks` of `page_size` tokens; at most `max_batch_tokens` tokens and 256 requests in a step. `attention`: a name of
    transformers' `AttentionInterface`, whose function gets what `plan_attention` makes of the step, a plan for each
    kind of attention; without it the model keeps the attention that it has. The model is switched to it for good.
    Raises `MemoryError` where the cache does not fit the machine.

    A step: `prepare`, `run`, `update`.
    """

    def __init__(
        self,
        model: Any,
        *,
        page_size: int,
        blocks: int,
        max_batch_tokens: int,
        scheduler: type[Scheduler],
        sampler: LogitsProcessor,
        attention: str | None = None,
        plan_attention: Callable[[CacheAccess], Any] | None = None,
    ) -> None:
        self.model = model
        self._plan_attention = plan_attention
        self._step: PagedStep | None = None
        name = f"meswitch.{scheduler.__qualname__}"
        SCHEDULER_MAPPING[name] = scheduler
        manager: ContinuousBatchingManager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=_settings(name, page_size, blocks, max_batch_tokens),
        )
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        processors.tensors_required = 1  # it counts only those it converted itself
        router = _NoRouter()
        _replace(manager, "logit_processor", processors)
        _replace(manager, "output_router", router)
        if attention is not None:  # before the processor, so that it sets up no masks
            model.set_attn_implementation(attention)
        state = torch.get_rng_state()  # building a processor seeds the global generator
        self._processor: Any = manager._create_batch_processor()
        torch.set_rng_state(state)
        self.scheduler: Any = self._processor.scheduler
        self._inputs: Any = self._processor.inputs_and_outputs
        self._cache: Any = self._processor.cache
        self._check_built(scheduler, processors, router, max_batch_tokens, blocks)
        self._model_kwargs: Any = self._inputs.get_model_kwargs
        _replace(self._inputs, "get_model_kwargs", self._with_attention_plans)

    def _check_built(self, scheduler: type, processors: Any, router: Any, max_batch_tokens: int, blocks: int) -> None:
        runner, sampling = self._processor.model_runner, self._processor.logit_processor
        for right, what in (
            (isinstance(self.scheduler, scheduler), "it takes no scheduler by name"),
            (sampling is processors and runner.logit_processor is processors, "it takes no logits processors"),
            (self._processor.output_router is router, "it takes no output router"),
            (type(self._inputs) is ContinuousBatchingIOs, "a step's inputs are prepared in another way"),
            (
                self._plan_attention is None or self._inputs.attention_mask is None,
                "it makes masks for an attention function that needs none",
            ),
            (self._cache.max_batch_tokens == max_batch_tokens, "it changes the most tokens of a step"),
            (self._cache.num_blocks >= blocks, "its cache is smaller than what was asked for"),
        ):
            if not right:
                raise changed(what)

    # requests

    def add(self, request_id: str, prompt: Sequence[int], max_new_tokens: int, eos: Iterable[int]) -> None:
        """Queues a request; it ends after `max_new_tokens` tokens or at one of `eos`."""
        self.scheduler.add_waiting_request(
            RequestState(
                request_id=request_id,
                initial_tokens=list(prompt),
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(eos),
            )
        )

    def cancel(self, request_id: str) -> None:
        """Takes out a request that has not finished, and frees its pages."""
        self.scheduler.set_request_cancellation(request_id)
        self.scheduler.clear_cancelled_requests()

    def close(self) -> None:
        """Frees the cache; the batch is of no use any more."""
        self.model = self.scheduler = self._step = None
        self._processor = self._inputs = self._cache = self._model_kwargs = None

    # a step

    def prepare(self) -> bool:
        """Chooses the requests of the next step, `scheduler.step`; false where there are none."""
        self.scheduler.step = []
        if not self._processor.prepare_next_batch():
            return False
        if self._inputs.requests_in_batch != self.scheduler.step:
            raise changed("schedule_batch does not give a step's requests first")
        return True

    def run(self) -> None:
        """The model's forward pass over the step, and sampling.

        Raises `UnsupportedModelError` where a layer went past the attention function.
        """
        self._processor._generation_step(self.model)
        if self._step is not None and not self._step.complete:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot run under continuous batching: "
                "some of its layers have an attention of their own"
            )

    def update(self) -> list[NewToken]:
        """Ends the step; its new tokens, in the order of the requests. A request that finished has left the batch."""
        self._processor.update_batch()
        return [
            NewToken(
                entry.state.request_id, entry.state.generated_tokens[-1], entry.state.status == RequestStatus.FINISHED
            )
            for entry in self.scheduler.step
            if entry.has_new_token
        ]

    def _with_attention_plans(self, use_padding: bool = False) -> Any:
        """In place of `get_model_kwargs`: the same, and the plan of every kind of attention."""
        kwargs: dict[str, Any] = self._model_kwargs(use_padding)
        requests = self._inputs.requests_in_batch
        queries = [entry.query_length for entry in requests]
        if (kwargs["input_ids"].shape[1], kwargs["logits_indices"].shape[0]) != (sum(queries), len(requests)):
            raise changed("a step does not have a token for every query and a row of logits for every request")
        if self._plan_attention is None:
            return kwargs
        # The lengths are the host's own numbers: asking the device for them would wait for it in every step.
        pasts = [entry.state.position_offset - entry.query_length for entry in requests]
        plans = {}
        for kind, allocator in self._cache.cache_allocators.items():
            keys = [allocator.get_seqlen_k(past, count) for past, count in zip(pasts, queries, strict=True)]
            access = CacheAccess(
                queries,
                keys,
                pasts,
                kwargs["cu_seq_lens_k"][kind].diff(),
                kwargs["read_index"][allocator.index],
                kwargs["write_index"][allocator.index],
                allocator.read_trash_index,
                _window(kind, allocator),
                allocator.cache_dtype,
            )
            plans[allocator.index] = self._plan_attention(access)
        self._step = kwargs[STEP] = kwargs["cache"] = PagedStep(self._cache.layer_to_allocator, plans)
        return kwargs

    # sizes, and what `compatibility` looks at

    @property
    def kv_tokens(self) -> int:
        """The most tokens that one request can have in the cache."""
        return infer_max_single_request_tokens(self._cache)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, of the indices of its tokens, and of the masks over them."""
        inputs = self._inputs
        masks = [] if inputs.attention_mask is None else list(inputs.attention_mask.values())
        indices = inputs.read_index_storage, inputs.write_index_storage
        return sum(tensor.nbytes for tensor in (self._cache.cache_tensor, *indices, *masks))

    @property
    def sectors(self) -> tuple[int, tuple[int, ...]]:
        """The bytes of a sector, and how many blocks of each kind of attention it holds."""
        blocks = tuple(allocator.blocks_per_sector for allocator in self._cache.cache_allocators.values())
        return self._cache.bytes_per_sector, blocks

    @property
    def shares_prefixes(self) -> bool:
        return bool(self._cache.use_prefix_sharing)

    def pages(self, request_id: str) -> set[tuple[int, int]]:
        """The blocks that a running request holds, as (kind of attention, block)."""
        return {
            (allocator.index, block)
            for allocator in self._cache.cache_allocators.values()
            for block in allocator.block_table.get(request_id, ())
        }

    def watch(self, called: set[str]) -> set[str]:
        """Adds to `called` the name of every replaced function when transformers calls it; gives all those names."""
        watched = [
            (self.scheduler, "schedule_batch"),
            (self.scheduler, "clear_cancelled_requests"),
            (self._inputs, "get_model_kwargs"),
        ]
        if self.shares_prefixes:
            watched.append((self._cache, "search_prefix_match"))
            watched += [(allocator, "mark_complete_blocks") for allocator in self._cache.cache_allocators.values()]
        names = [f"{type(owner).__name__}.{function}" for owner, function in watched]
        for name, (owner, function) in zip(names, watched, strict=True):
            _watch(owner, function, name, called)
        return set(names)


def _settings(scheduler: str, page_size: int, blocks: int, max_batch_tokens: int) -> ContinuousBatchingConfig:
    return ContinuousBatchingConfig(
        scheduler_type=scheduler,
        page_size=page_size,
        num_blocks=blocks,
        max_batch_tokens=max_batch_tokens,
        max_requests_per_batch=min(256, max_batch_tokens),
        max_memory_percent=1.0,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
        seed=0,
    )


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        raise changed(f"{type(owner).__name__} has no {name}")
    setattr(owner, name, value)


def _watch(owner: Any, name: str, label: str, called: set[str]) -> None:
    function = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        called.add(label)
        return function(*args, **kwargs)

    setattr(owner, name, watched)


# Classes and functions whose signatures `signatures` compares with how they are called here.
INTERNALS: tuple[Any, ...] = (
    *(FIFOScheduler, PagedAttentionCache, *ATTN_TYPE_TO_ALLOCATOR.values()),
    *(ContinuousBatchingLogitsProcessor, ContinuousBatchingLogitsProcessorList),
    *(ContinuousBatchProcessor, ContinuousBatchingIOs, ContinuousBatchingManager, OutputRouter, RequestState),
    *(ContinuousBatchingConfig, PreTrainedModel, GenerationMixin),
    *(group_layers_by_attn_type, find_head_dim, find_num_key_value_heads, infer_max_single_request_tokens),
)
