"""The continuous-batching scheduler that knows experts, the sampler that knows requests, and the KV cache's
size.

transformers packs the tokens of all requests of a step into one row. `ExpertScheduler` remembers the step it
chose, so the slot of every packed token and of every kept logits row is known before the forward pass, and it
keeps the prefix cache apart by expert. `RequestSampler` gives each logits row its own request's processors
and random generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cache import (
    ATTN_TYPE_TO_ALLOCATOR,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from meswitch.errors import BudgetError, UnsupportedModelError

NAME = "meswitch"
BASE = -1  # the slot of a request that the base answers


@dataclass
class Seat:
    """Where a request sits: the slot of its expert, and the salt that keeps its prefixes apart from
    others'."""

    slot: int = BASE
    salt: int = 0


class ExpertScheduler(FIFOScheduler):  # type: ignore[misc,unused-ignore]
    """First in, first out over all experts; see the module's docstring."""

    def __init__(self, cache: Any, safety_margin: float | None, max_requests_per_batch: int) -> None:
        self.seats: dict[str, Seat] = {}
        self.step: list[FutureRequestState] = []
        self._stand_ins: dict[tuple[int, int], int] = {}
        super().__init__(cache, safety_margin, max_requests_per_batch)
        self._salt_prefixes(cache)

    def _salt_prefixes(self, cache: Any) -> None:
        """Block hashes chain from a prompt's first token, so another id in its place starts another chain."""
        search = cache.search_prefix_match
        cache.search_prefix_match = lambda request_id, ids: search(request_id, self._salted(request_id, ids))
        for allocator in cache.cache_allocators.values():
            allocator.mark_complete_blocks = self._salted_marks(allocator.mark_complete_blocks)

    def _salted_marks(self, mark: Callable[[str, list[int], int], None]) -> Callable[[str, list[int], int], None]:
        return lambda request_id, ids, count: mark(request_id, self._salted(request_id, ids), count)

    def _salted(self, request_id: str, ids: list[int]) -> list[int]:
        salt = self.seats[request_id].salt
        if not salt or not ids:
            return ids
        stand_in = self._stand_ins.setdefault((salt, ids[0]), -1 - len(self._stand_ins))
        return [stand_in, *ids[1:]]

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        batch = super().schedule_batch(token_budget, cache_budget)
        self.step = batch[0] or []
        return batch

    def clear_cancelled_requests(self) -> list[RequestState]:
        cancelled: list[RequestState] = super().clear_cancelled_requests()
        if cancelled:  # as when a request finishes: its blocks are free again
            self.block_new_requests = False
        return cancelled

    def token_slots(self) -> list[int]:
        """The slot of every packed token of the step, in order."""
        slots: list[int] = []
        for entry in self.step:
            slots += [self.seats[entry.state.request_id].slot] * entry.query_length
        return slots

    def kept_slots(self) -> list[int]:
        """The slot of every row that reaches lm_head: one a request, those with a new token first."""
        slots = [self.seats[entry.state.request_id].slot for entry in self.step if entry.has_new_token]
        return slots + [BASE] * (len(self.step) - len(slots))


SCHEDULER_MAPPING[NAME] = ExpertScheduler


@dataclass
class Draw:
    """How a request chooses its next token. `vocabulary`: ids its own model knows; `generator`: none for
    greedy."""

    processors: LogitsProcessorList
    vocabulary: int
    generator: torch.Generator | None = None


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """Applies each request's own processors to its row, draws with its own generator, and leaves the drawn
    token as the row's only finite score, so that the argmax that follows picks it. Plain greedy rows are left
    alone."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the base class's own declaration
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.draws: dict[str, Draw] = {}
        self.observe: Callable[[list[str], Tensor], None] | None = None
        self._states: list[RequestState] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[FutureRequestState]) -> Tensor:
        self._states = [entry.state for entry in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """`scores float32 [rows, vocabulary]`; rows beyond the requests with a new token belong to nobody."""
        if self.observe is not None:
            self.observe([state.request_id for state in self._states], scores)
        for row, state in enumerate(self._states):
            draw = self.draws[state.request_id]
            if draw.vocabulary < scores.shape[1]:
                # A model may squash its logits after lm_head (soft-capping), and −inf with them.
                scores[row, draw.vocabulary :] = -torch.inf
            if draw.processors or draw.generator is not None:
                token = _draw(draw, state, scores[row, : draw.vocabulary])
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


def _draw(draw: Draw, state: RequestState, scores: Tensor) -> int:
    ids: Any = torch.tensor([state.initial_tokens + state.generated_tokens])
    processed = draw.processors(ids, scores[None].clone())
    if draw.generator is None:
        return int(processed.argmax())
    probabilities = processed.softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=draw.generator))


@dataclass(frozen=True)
class CachePlan:
    """The size of the KV cache: `blocks` of `page_size` tokens for every layer, at most `nbytes` in all."""

    page_size: int
    blocks: int
    max_batch_tokens: int
    nbytes: int


def plan_cache(
    config: Any, dtype: torch.dtype, budget: int, *, max_batch_tokens: int, page_size: int = 32
) -> CachePlan:
    """What fits `budget` bytes: the pages, two spare sectors, the read indices and the attention masks over
    them.

    `config` is the text config of a model that continuous batching knows. Raises `BudgetError` with the least
    budget.
    """
    size = cache_geometry(config, dtype, page_size)
    fixed = size.fixed(max_batch_tokens)
    sectors = (budget - fixed) // size.per_sector(max_batch_tokens)
    if sectors < size.least_sectors:
        least = fixed + size.least_sectors * size.per_sector(max_batch_tokens)
        raise BudgetError(
            f"kv_budget: expected at least {least} bytes for one page of {page_size} tokens and steps of "
            f"{max_batch_tokens} tokens, found {budget} bytes",
            hint="raise kv_budget or lower max_batch_tokens",
        )
    blocks = sectors * size.sector_bytes // size.block_bytes
    nbytes = fixed + sectors * size.per_sector(max_batch_tokens)
    return CachePlan(page_size, blocks, max_batch_tokens, nbytes)


@dataclass(frozen=True)
class CacheGeometry:
    """Bytes and tokens of the units that transformers' paged cache is made of.

    A sector belongs to one kind of attention at a time and holds `blocks_per_sector` blocks of it; a block
    holds `page_size` tokens for every layer of that kind. `block_bytes` is a block over all layers.
    """

    page_size: int
    sector_bytes: int
    blocks_per_sector: tuple[int, ...]
    block_bytes: int
    itemsize: int

    @property
    def least_sectors(self) -> int:
        return len(self.blocks_per_sector)

    def per_sector(self, max_batch_tokens: int) -> int:
        """A sector, and what its tokens take in the read indices and in the attention masks."""
        kinds = len(self.blocks_per_sector)
        tokens = max(self.blocks_per_sector) * self.page_size
        return self.sector_bytes + tokens * kinds * (8 + max_batch_tokens * self.itemsize)

    def fixed(self, max_batch_tokens: int) -> int:
        return 2 * self.sector_bytes + len(self.blocks_per_sector) * self.itemsize * max_batch_tokens**2

    def need(self, tokens: int, max_batch_tokens: int) -> int:
        """Bytes of a cache that holds `tokens` tokens in every layer."""
        pages = -(-tokens // self.page_size)
        sectors = sum(-(-pages // blocks) for blocks in self.blocks_per_sector)
        return self.fixed(max_batch_tokens) + sectors * self.per_sector(max_batch_tokens)


def cache_geometry(config: Any, dtype: torch.dtype, page_size: int = 32) -> CacheGeometry:
    """Raises `UnsupportedModelError` where the text config has layers that continuous batching does not
    know."""
    try:
        layers = [len(indices) for indices in group_layers_by_attn_type(config).values()]
        page_bytes = 2 * find_num_key_value_heads(config) * find_head_dim(config) * dtype.itemsize * page_size
    except (ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{config.model_type}: expected layers of {' and '.join(ATTN_TYPE_TO_ALLOCATOR)}, found: {error}"
        ) from error
    sector = lcm(*(count * page_bytes for count in layers), 128)
    blocks = tuple(sector // (count * page_bytes) for count in layers)
    return CacheGeometry(page_size, sector, blocks, config.num_hidden_layers * page_bytes, dtype.itemsize)
