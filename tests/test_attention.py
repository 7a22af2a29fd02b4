"""Which requests attend together, what they see, and that a batch of them gives what each gives alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.continuous_batching.utils import build_attention_mask

from meswitch.batching.attention import AttentionGroup, attend, group_requests, visible


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 400)), min_size=1, max_size=40))
def test_groups_are_neighbours_alike(requests: list[tuple[int, int]]) -> None:
    queries, keys = [asked for asked, _ in requests], [asked + past for asked, past in requests]
    found = list(group_requests(queries, keys))
    assert [at for group in found for at in range(group.start, group.stop)] == list(range(len(requests)))
    for group in found:
        assert len(set(queries[group])) == 1
        assert len(keys[group]) * max(keys[group]) <= 2 * sum(keys[group])


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 30), st.none() | st.integers(2, 20))
def test_what_a_token_sees_is_what_transformers_lets_it(queries: int, one: int, two: int, window: int | None) -> None:
    keys = [queries + (past if window is None else min(past, window - 1)) for past in (one, two)]
    least = torch.finfo(torch.float32).min
    own = visible(queries, max(keys), torch.tensor(keys), window, torch.float32)
    for mask, count in zip(own, keys, strict=True):
        expected = torch.full((1, 1, queries, count), least)
        build_attention_mask(expected, [0, queries], [0, count], 1 if window is None else window)
        assert torch.equal(mask[..., :count], expected[0])
        assert (mask[..., count:] == least).all()


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, cap: float | None
) -> torch.Tensor:
    """`query [heads, queries, d]`, `key` and `value [kv_heads, keys, d]`, in float64, a formula a line."""
    heads = query.shape[0] // key.shape[0]
    logits = 0.3 * query.double() @ key.double().repeat_interleave(heads, 0).mT
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights @ value.double().repeat_interleave(heads, 0)


def packed(requests: int, tokens: int, heads: int, seed: int) -> torch.Tensor:
    """`[requests · tokens, heads, 8]`."""
    return torch.randn(requests * tokens, heads, 8, generator=torch.Generator().manual_seed(seed))


def group_of(requests: int, queries: int, keys: int, mask: torch.Tensor | None) -> AttentionGroup:
    return AttentionGroup(requests, queries, keys, slice(0, requests * queries), slice(0, requests * keys), mask)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("queries", "keys"), [(1, [700, 700]), (1, [3, 700]), (600, [600]), (600, [700, 650])])
def test_a_batch_is_each_request_alone(queries: int, keys: list[int], window: int | None, cap: float | None) -> None:
    """Longer than the blocks that the kernels work in."""
    requests, longest = len(keys), max(keys)
    query, key, value = (
        packed(requests, queries, 4, 0),
        packed(requests, longest, 2, 1),
        packed(requests, longest, 2, 2),
    )
    mask = visible(queries, max(keys), torch.tensor(keys), window, torch.float32)
    found = attend(group_of(requests, queries, longest, mask), query, key, value, 0.3, cap)
    for at, count in enumerate(keys):
        own, first = slice(at * queries, (at + 1) * queries), at * longest
        q, k, v = (x.transpose(0, 1) for x in (query[own], key[first : first + count], value[first : first + count]))
        expected = dense(q, k, v, mask[at, :, :, :count] == 0, cap).transpose(0, 1)
        torch.testing.assert_close(found[own].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("queries", [1, 600])
def test_no_mask_means_every_key_up_to_its_own(queries: int, cap: float | None) -> None:
    parts = packed(2, queries, 4, 0), packed(2, 600, 2, 1), packed(2, 600, 2, 2)
    mask = visible(queries, 600, torch.tensor([600, 600]), None, torch.float32)
    found, expected = (attend(group_of(2, queries, 600, given), *parts, 0.3, cap) for given in (None, mask))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
