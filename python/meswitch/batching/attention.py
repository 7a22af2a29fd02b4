"""Attention over the paged cache, each request over its own keys.

transformers packs the requests of a step into one row, lets every token look at every request's keys and masks what
is another's: work, and copies of keys and values for their query heads, that grow with the square of the requests.
Here requests that lie next to each other make a group, and a group is a batch:

    step    a a a b c d        queries, packed         d has as many queries as b and c, but far more keys
    groups  [a a a] [b c] [d]  batches of one, two and one request; the keys of b and c padded to the longer

Lengths are the host's numbers and every tensor is made on the model's device, so a step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from meswitch.batching.step import CacheAccess, PagedStep
from meswitch.errors import UnsupportedModelError

PAGED = "meswitch_paged"
BLOCK_QUERIES = 8
"""Queries that attend together where a token's arithmetic is to follow from its position."""
# Keywords that change nothing here, and why.
IGNORED = {
    **dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "read_index", "write_index", "cache"),
        "how the requests of a step lie side by side: `PagedStep` holds it",
    ),
    **dict.fromkeys(("logits_indices", "logits_processor_args"), "what follows the last layer"),
    "position_ids": "queries and keys have their positions already",
    "use_cache": "keys and values are always kept",
}


def group_requests(queries: list[int], keys: list[int]) -> Iterator[slice]:
    """Neighbours with equally many queries, where padding to the longest at most doubles their keys.

    >>> list(group_requests([3, 1, 1, 1], [3, 4, 7, 90]))
    [slice(0, 1, None), slice(1, 3, None), slice(3, 4, None)]
    """
    first = total = longest = 0
    for index, (wanted, count) in enumerate(zip(queries, keys, strict=True)):
        total, longest = total + count, max(longest, count)
        if index > first and (wanted != queries[first] or (index + 1 - first) * longest > 2 * total):
            yield slice(first, index)
            first, total, longest = index, count, count
    yield slice(first, len(keys))


@dataclass(frozen=True)
class AttentionGroup:
    """`requests` of `queries` tokens and `keys` keys each: `token_range` of the step's tokens, `key_range` of its keys.

    `mask [requests, 1, queries, keys]` is added to the logits; without it a token sees the keys up to its own.
    """

    requests: int
    queries: int
    keys: int
    token_range: slice
    key_range: slice
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How the groups' tokens and keys lie where they are not simply those of the step, one after another: the query and
    the key in each place, and the place of each token. All `int64`."""

    queries: Tensor
    keys: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """What the layers of one kind of attention do in a step. `read int64 [keys of all groups]`: where the keys lie in
    the cache, empty where nothing was cached before; `write int64 [tokens]`: where the new ones go. `window`: how many
    keys a token sees at most."""

    groups: list[AttentionGroup]
    read: Tensor
    write: Tensor
    window: int | None
    layout: Layout | None = None


def plan_attention(access: CacheAccess) -> AttentionPlan:
    """The step's requests in groups, each with the mask that it needs."""
    groups: list[AttentionGroup] = []
    padded: list[Tensor] = []
    token = key = done = 0
    for members in group_requests(access.queries, access.keys):
        queries, counts = access.queries[members.start], access.keys[members]
        longest, requests = max(counts), len(counts)
        token_range, key_range = slice(token, token + requests * queries), slice(key, key + requests * longest)
        on_device = access.key_counts[members]
        mask = None
        if _needs_mask(queries, counts, access.window):
            mask = visible(queries, longest, on_device, access.window, access.dtype)
        groups.append(AttentionGroup(requests, queries, longest, token_range, key_range, mask))
        own, done = access.read[done : done + sum(counts)], done + sum(counts)
        padded.append(own if min(counts) == longest else _padded(own, longest, on_device, access.padding))
        token, key = token_range.stop, key_range.stop
    return AttentionPlan(groups, torch.cat(padded), access.write, access.window)


def plan_invariant_attention(access: CacheAccess) -> AttentionPlan:
    """A plan whose arithmetic for a token follows from its position alone, whoever and whatever else is in the step.

    Every request's sequence has blocks of `BLOCK_QUERIES` positions, from its beginning. A block attends by itself,
    over as many keys as can be seen from it, and as a whole: what is not in the step is filled with other tokens.
    """
    groups: list[AttentionGroup] = []
    queries, keys, tokens = [], [], []
    masks: dict[int, Tensor] = {}
    token = key = placed_tokens = placed_keys = 0
    device = access.read.device

    def before(block: int) -> int:
        """Keys that a block sees before its own."""
        return block if access.window is None else min(block, access.window - 1)

    def nearest(first: int, end: int, start: int, count: int, at: int) -> Tensor:
        """Where the positions from `first` to `end` lie, if `count` from `start` on begin at `at`."""
        return at + (torch.arange(first, end, device=device) - start).clamp(0, count - 1)

    for first, asked, known in zip(access.firsts, access.queries, access.keys, strict=True):
        start, last = first // BLOCK_QUERIES * BLOCK_QUERIES, first + asked
        end = -(-last // BLOCK_QUERIES) * BLOCK_QUERIES
        lowest = start - before(start)
        queries.append(nearest(start, end, first, asked, token))
        keys.append(nearest(lowest, end, last - known, known, key))
        tokens.append(placed_tokens + torch.arange(first - start, last - start, device=device))
        for block in range(start, end, BLOCK_QUERIES):
            seen = before(block) + BLOCK_QUERIES
            if block not in masks:
                count = torch.full((1,), seen, device=device)
                masks[block] = visible(BLOCK_QUERIES, seen, count, access.window, access.dtype)
            at, behind = placed_tokens + block - start, placed_keys + block - before(block) - lowest
            own, over = slice(at, at + BLOCK_QUERIES), slice(behind, behind + seen)
            groups.append(AttentionGroup(1, BLOCK_QUERIES, seen, own, over, masks[block]))
        token, key = token + asked, key + known
        placed_tokens, placed_keys = placed_tokens + end - start, placed_keys + end - lowest
    layout = Layout(torch.cat(queries), torch.cat(keys), torch.cat(tokens))
    return AttentionPlan(groups, access.read, access.write, access.window, layout)


def _padded(read: Tensor, longest: int, counts: Tensor, padding: int) -> Tensor:
    own = torch.arange(longest, device=read.device) < counts[:, None]
    return read.new_full(own.shape, padding).masked_scatter_(own, read).flatten()


def _needs_mask(queries: int, keys: list[int], window: int | None) -> bool:
    """Whether a mask says more than that every token sees the keys up to its own."""
    longest = max(keys)
    return min(keys) != longest or queries not in (1, longest) or (window is not None and longest > window)


def visible(queries: int, longest: int, counts: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """0 where a token sees a key, the least number elsewhere: `[requests, 1, queries, longest]`, where
    `counts int [requests]` are the keys of each request. A request's last key is its last token's own."""
    device = counts.device
    own = counts[:, None, None] - queries + torch.arange(queries, device=device)[:, None]
    key = torch.arange(longest, device=device)
    hidden = key > own
    if window is not None:
        hidden |= key <= own - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    paged_step: PagedStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `query [1, heads, T, d]`, `key` and `value [1, kv_heads, T, d]` of the new
    tokens; gives `[1, T, heads, d]`. Raises `UnsupportedModelError` for whatever this attention would leave out."""
    if paged_step is None:
        raise _unsupported(module, "does not receive what a step hands to the model")
    if attention_mask is not None:
        raise _unsupported(module, "makes an attention mask of its own")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise _unsupported(module, "lets tokens see later ones")
    if dropout:
        raise _unsupported(module, "drops attention weights")
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in IGNORED:
            raise _unsupported(module, f"passes {name!r}, which attention over the paged cache does not know")
    layer = module.layer_idx
    plan: AttentionPlan = paged_step.plan(layer)
    if sliding_window != plan.window and not _is_whole(plan.window, module):
        raise _unsupported(module, f"has a window of {sliding_window}, and its config says {plan.window}")
    if not paged_step.enter(layer):
        raise _unsupported(module, "attends more than once in a layer")
    new_keys, new_values = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = paged_step.write_and_read(layer, new_keys, new_values, plan.read, plan.write)
    queries, layout = query[0].transpose(0, 1), plan.layout
    if layout is not None:
        queries, keys, values = queries[layout.queries], keys[layout.keys], values[layout.keys]
    outputs = [
        attend(group, queries[group.token_range], keys[group.key_range], values[group.key_range], scaling, softcap)
        for group in plan.groups
    ]
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return (output if layout is None else output[layout.tokens])[None], None


def _is_whole(window: int | None, module: Any) -> bool:
    """Whether a window hides nothing in the longest sequence that a model takes."""
    return window is not None and window >= getattr(module.config, "max_position_embeddings", torch.inf)


def _unsupported(module: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(module).__name__} cannot run under continuous batching: it {why}")


def attend(
    group: AttentionGroup, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """`query [requests · queries, heads, d]`, `key` and `value [requests · keys, kv_heads, d]`; shaped as `query`."""
    packed, heads, size = query.shape
    kv_heads = key.shape[1]
    key, value = (x.view(group.requests, group.keys, kv_heads, size).transpose(1, 2) for x in (key, value))
    if softcap is None and group.queries == 1:
        # The query heads of a key head as its tokens, so that it is read once for all of them.
        query = query.view(group.requests, kv_heads, -1, size)
        return F.scaled_dot_product_attention(query, key, value, group.mask, scale=scaling).reshape(packed, heads, size)
    query = query.view(group.requests, group.queries, heads, size).transpose(1, 2)
    if softcap is None:
        causal = group.mask is None
        output = F.scaled_dot_product_attention(
            query, key, value, group.mask, is_causal=causal, scale=scaling, enable_gqa=True
        )
    else:
        output = _capped(group, query, key, value, scaling, softcap)
    return output.transpose(1, 2).reshape(packed, heads, size)


def _capped(group: AttentionGroup, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float) -> Tensor:
    """With soft-capped logits (Gemma 2), which `scaled_dot_product_attention` does not support."""
    heads = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(heads, dim=1).transpose(2, 3) * scaling
    logits = torch.tanh(logits / softcap) * softcap
    mask = group.mask
    if mask is None and group.queries > 1:
        counts = torch.full((1,), group.keys, device=query.device)
        mask = visible(group.queries, group.keys, counts, None, query.dtype)
    if mask is not None:
        logits = logits + mask
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ value.repeat_interleave(heads, dim=1)


# which attention a model runs with


def plain_attention(model: Any) -> str:
    """The implementation that computes what the model means, outside of continuous batching."""
    return "sdpa" if model.config._attn_implementation == "sdpa" and not _is_capped(model) else "eager"


def can_be_paged(model: Any) -> bool:
    """Whether `paged_attention` may stand in for the attention that the model was loaded with."""
    return model.config._attn_implementation == "sdpa" or _is_capped(model)


def _is_capped(model: Any) -> bool:
    return getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None) is not None


@contextmanager
def switched_attention(model: Any, implementation: str) -> Iterator[None]:
    """Runs what is inside with another attention implementation, and switches back."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


AttentionInterface.register(PAGED, paged_attention)
