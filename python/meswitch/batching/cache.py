"""How large a KV cache is: what transformers' paged cache takes for so many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

from meswitch.batching.bridge import FULL, SLIDING, changed, key_value_shape, layers_by_attention
from meswitch.errors import BudgetError, UnsupportedModelError


@dataclass(frozen=True)
class CachePlan:
    """The size of the KV cache: `blocks` of `page_size` tokens for every layer, at most `nbytes` in all."""

    page_size: int
    blocks: int
    max_batch_tokens: int
    nbytes: int

    def check(self, nbytes: int) -> None:
        """Raises `TransformersVersionError` where the cache that was built takes more than planned."""
        if nbytes > self.nbytes:
            raise changed(f"a KV cache of {self.blocks} blocks takes {nbytes} bytes, planned were {self.nbytes}")


def plan_cache(
    config: Any, dtype: torch.dtype, budget: int, *, max_batch_tokens: int, page_size: int = 32
) -> CachePlan:
    """What fits `budget` bytes: the pages, two spare sectors, the read indices and the attention masks over them.

    `config` is the text config of a model that continuous batching knows. Raises `BudgetError` with the least budget.
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

    A sector belongs to one kind of attention at a time and holds `blocks_per_sector` blocks of it; a block holds
    `page_size` tokens for every layer of that kind. `block_bytes` is a block over all layers.
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
    """Raises `UnsupportedModelError` where the text config has layers that continuous batching does not know."""
    try:
        layers = [len(indices) for indices in layers_by_attention(config).values()]
        heads, width = key_value_shape(config)
    except (ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{config.model_type}: expected layers of {FULL} and {SLIDING}, found: {error}"
        ) from error
    page_bytes = 2 * heads * width * dtype.itemsize * page_size
    sector = lcm(*(count * page_bytes for count in layers), 128)
    blocks = tuple(sector // (count * page_bytes) for count in layers)
    return CacheGeometry(page_size, sector, blocks, config.num_hidden_layers * page_bytes, dtype.itemsize)
