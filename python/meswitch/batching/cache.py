"""How large a KV cache is: what transformers' paged cache takes for so many tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

from meswitch.batching.bridge import FULL, SLIDING, changed, key_value_shape, layers_by_attention
from meswitch.errors import BudgetError, UnsupportedModelError

_INDEX_BYTES = 8


@dataclass(frozen=True)
class CachePlan:
    """The size of the KV cache: `blocks` of `page_size` tokens for every layer, `nbytes` in all."""

    page_size: int
    blocks: int
    max_batch_tokens: int
    nbytes: int

    def check(self, nbytes: int) -> None:
        """Raises `TransformersVersionError` where the cache that was built takes more than planned."""
        if nbytes > self.nbytes:
            raise changed(f"a KV cache of {self.blocks} blocks takes {nbytes} bytes, planned were {self.nbytes}")


def plan_cache(
    config: Any, dtype: torch.dtype, budget: int, *, max_batch_tokens: int, page_size: int = 32, masks: bool = False
) -> CachePlan:
    """What fits `budget` bytes: the pages, two spare sectors, the indices of tokens, and `masks` where attention is
    transformers' own, which needs them.

    `config` is the text config of a model that continuous batching knows. Raises `BudgetError` with the least budget.
    """
    size = cache_geometry(config, dtype, page_size, masks=masks)
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
    built = -(-blocks * size.block_bytes // size.sector_bytes)  # as many sectors as hold the blocks, perhaps fewer
    nbytes = fixed + built * size.per_sector(max_batch_tokens)
    return CachePlan(page_size, blocks, max_batch_tokens, nbytes)


@dataclass(frozen=True)
class CacheGeometry:
    """Bytes and tokens of the units that transformers' paged cache is made of.

    A sector belongs to one kind of attention at a time and holds `blocks_per_sector` blocks of it; a block holds
    `page_size` tokens for every layer of that kind. `block_bytes` is a block over all layers. `mask_bytes`: of a number
    of an attention mask, a row for each token of a step and a mask for each kind; 0 where there are none.
    """

    page_size: int
    sector_bytes: int
    blocks_per_sector: tuple[int, ...]
    block_bytes: int
    mask_bytes: int

    @property
    def least_sectors(self) -> int:
        return len(self.blocks_per_sector)

    def per_sector(self, max_batch_tokens: int) -> int:
        """A sector, and what its tokens take in the index of what is read and in the masks."""
        tokens = max(self.blocks_per_sector) * self.page_size
        return self.sector_bytes + tokens * self._readable(max_batch_tokens)

    def fixed(self, max_batch_tokens: int) -> int:
        """Two spare sectors, and what a step's own tokens take in both indices and in the masks."""
        written = len(self.blocks_per_sector) * _INDEX_BYTES
        return 2 * self.sector_bytes + max_batch_tokens * (written + self._readable(max_batch_tokens))

    def _readable(self, max_batch_tokens: int) -> int:
        """Bytes that a token that can be read takes beside its keys and values."""
        return len(self.blocks_per_sector) * (_INDEX_BYTES + max_batch_tokens * self.mask_bytes)

    def need(self, tokens: int, max_batch_tokens: int) -> int:
        """Bytes of a cache that holds `tokens` tokens in every layer."""
        pages = -(-tokens // self.page_size)
        sectors = sum(-(-pages // blocks) for blocks in self.blocks_per_sector)
        return self.fixed(max_batch_tokens) + sectors * self.per_sector(max_batch_tokens)


def cache_geometry(config: Any, dtype: torch.dtype, page_size: int = 32, *, masks: bool = False) -> CacheGeometry:
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
    return CacheGeometry(page_size, sector, blocks, config.num_hidden_layers * page_bytes, dtype.itemsize * masks)
