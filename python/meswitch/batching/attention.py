"""Attention over the paged cache, each request over its own keys.

transformers packs the requests of a step into one row, lets every token look at every request's keys and masks what
is another's: work, and copies of keys and values for their query heads, that grow with the square of the requests.
Here requests that lie next to each other make a *stretch*, and a stretch is a batch:

    step      a a a b c d        queries, packed         d asks for as many tokens as b and c, but has far more keys
    stretches [a a a] [b c] [d]  batches of one, two and one request; the keys of b and c padded to the longer
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

PAGED = "meswitch_paged"


def stretches(queries: list[int], keys: list[int]) -> Iterator[slice]:
    """Neighbours that ask for equally many tokens, where padding to the longest at most doubles their keys.

    >>> list(stretches([3, 1, 1, 1], [3, 4, 7, 90]))
    [slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)]
    """
    first = total = longest = 0
    for at, (asked, count) in enumerate(zip(queries, keys, strict=True)):
        total, longest = total + count, max(longest, count)
        if at > first and (asked != queries[first] or (at + 1 - first) * longest > 2 * total):
            yield slice(first, at)
            first, total, longest = at, count, count
    yield slice(first, len(keys))


@dataclass(frozen=True)
class Stretch:
    """`requests` of `queries` tokens and `keys` keys each, at `asked` among the step's tokens and at `read` among its
    keys. `mask [requests, 1, queries, keys]` is added to the logits; none: a token sees the keys up to its own."""

    requests: int
    queries: int
    keys: int
    asked: slice
    read: slice
    mask: Tensor | None = None


@dataclass(frozen=True)
class Reads:
    """What the layers of one kind of attention read and write in a step. `read int64 [keys of all stretches]`, empty
    where nothing was cached before; `write int64 [tokens]`."""

    stretches: list[Stretch]
    read: Tensor
    write: Tensor


def plan_reads(allocator: Any, queries: list[int], keys: list[int], read: Tensor, write: Tensor) -> Reads:
    """`allocator`: of the kind's pages; `queries` and `keys`: how many each request of the step has."""
    window = getattr(allocator, "sliding_window", None)
    planned: list[Stretch] = []
    padded: list[Tensor] = []
    token = key = done = 0
    for stretch in stretches(queries, keys):
        count, lengths = queries[stretch.start], keys[stretch]
        longest, requests = max(lengths), len(lengths)
        asked, place = slice(token, token + requests * count), slice(key, key + requests * longest)
        mask = None
        if _needs_mask(count, lengths, window):
            mask = visible(count, lengths, window, allocator.cache_dtype, read.device)
        planned.append(Stretch(requests, count, longest, asked, place, mask))
        own, done = read[done : done + sum(lengths)], done + sum(lengths)
        padded.append(own if min(lengths) == longest else _padded(own, lengths, allocator.read_trash_index))
        token, key = asked.stop, place.stop
    return Reads(planned, torch.cat(padded), write)


def _padded(read: Tensor, lengths: list[int], filler: int) -> Tensor:
    own = torch.arange(max(lengths), device=read.device) < torch.tensor(lengths, device=read.device)[:, None]
    return read.new_full(own.shape, filler).masked_scatter_(own, read).flatten()


def _needs_mask(queries: int, keys: list[int], window: int | None) -> bool:
    """Whether it is more than that every token sees the keys up to its own."""
    longest = max(keys)
    return min(keys) != longest or queries not in (1, longest) or (window is not None and longest > window)


def visible(
    queries: int, keys: list[int], window: int | None, dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """0 where a token sees a key, the least number elsewhere: `[requests, 1, queries, longest]`. A request's last key
    is its last token's own."""
    own = torch.tensor(keys, device=device)[:, None, None] - queries + torch.arange(queries, device=device)[:, None]
    key = torch.arange(max(keys), device=device)
    hidden = key > own
    if window is not None:
        hidden |= key <= own - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def hand_reads(inputs: Any) -> None:
    """Lets `inputs`, transformers' inputs of a step, hand every layer the step's `Reads` of its kind of attention."""
    own = inputs.get_model_kwargs

    def get_model_kwargs(use_padding: bool = False) -> Any:
        step = own(use_padding)
        queries = step["cu_seq_lens_q"].diff().tolist()
        step["reads"] = {
            allocator.index: plan_reads(
                allocator,
                queries,
                step["cu_seq_lens_k"][kind].diff().tolist(),
                step["read_index"][allocator.index],
                step["write_index"][allocator.index],
            )
            for kind, allocator in step["cache"].cache_allocators.items()
        }
        return step

    inputs.get_model_kwargs = get_model_kwargs


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    cache: Any = None,
    reads: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `query [1, heads, T, d]`, `key` and `value [1, kv_heads, T, d]` of the new
    tokens; gives `[1, T, heads, d]`."""
    allocator = cache.layer_to_allocator[module.layer_idx]
    step: Reads = reads[allocator.index]
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = allocator.update(new_keys, new_values, module.layer_idx, step.read, step.write)
    asked = query[0].transpose(0, 1)
    outputs = [
        attend(stretch, asked[stretch.asked], keys[stretch.read], values[stretch.read], scaling, softcap)
        for stretch in step.stretches
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def attend(
    stretch: Stretch, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """`query [requests · queries, heads, d]`, `key` and `value [requests · keys, kv_heads, d]`; shaped as `query`."""
    packed, heads, size = query.shape
    kv_heads = key.shape[1]
    key, value = (x.view(stretch.requests, stretch.keys, kv_heads, size).transpose(1, 2) for x in (key, value))
    if softcap is None and stretch.queries == 1:
        # The query heads of a key head as its tokens, so that it is read once for all of them.
        query = query.view(stretch.requests, kv_heads, -1, size)
        return F.scaled_dot_product_attention(query, key, value, stretch.mask, scale=scaling).reshape(
            packed, heads, size
        )
    query = query.view(stretch.requests, stretch.queries, heads, size).transpose(1, 2)
    if softcap is None:
        causal = stretch.mask is None
        output = F.scaled_dot_product_attention(
            query, key, value, stretch.mask, is_causal=causal, scale=scaling, enable_gqa=True
        )
    else:
        output = _capped(stretch, query, key, value, scaling, softcap)
    return output.transpose(1, 2).reshape(packed, heads, size)


def _capped(stretch: Stretch, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float) -> Tensor:
    """With soft-capped logits (Gemma 2), which `scaled_dot_product_attention` has not."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    logits = torch.tanh(logits / softcap) * softcap
    mask = stretch.mask
    if mask is None and stretch.queries > 1:
        mask = visible(stretch.queries, [stretch.keys], None, query.dtype, query.device)
    if mask is not None:
        logits = logits + mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value.repeat_interleave(groups, dim=1)


AttentionInterface.register(PAGED, paged_attention)
