"""With `exact=True` a request's logits have the same bits alone and among others, as have the parts of them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from families import config_of, save_finetune, save_random
from meswitch.batching.attention import paged_attention, plan_invariant_attention
from meswitch.batching.step import CacheAccess, PagedStep
from meswitch.compression.job import compress
from meswitch.engine.engine import Engine
from meswitch.kernels import invariance
from meswitch.kernels.invariance import BatchInvariance
from test_engine_families import in_order, watch

DTYPES = ("bfloat16", "float32")


# products and functions


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from(DTYPES), st.integers(0, 99))
def test_rows_do_not_depend_on_each_other(rows: int, width: int, dtype: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, width, generator=generator).to(getattr(torch, dtype)) for n in (rows, 33))
    bias, row = weight[:, 0], slice(seed % rows, seed % rows + 1)
    operations: list[Any] = [
        lambda x: F.linear(x, weight, bias),
        lambda x: torch.addmm(bias, x, weight.T),
        lambda x: x @ weight.T,
        F.silu,
        lambda x: F.gelu(x, approximate="tanh"),
        torch.tanh,
        lambda x: x.exp(),
    ]
    for operation in operations:
        with BatchInvariance():
            together, alone = operation(x), operation(x[row])
        assert torch.equal(together[row], alone)
        torch.testing.assert_close(together, operation(x))


def test_empty_batches_and_other_shapes_pass() -> None:
    weight = torch.randn(5, 4)
    with BatchInvariance():
        assert F.linear(torch.zeros(2, 0, 4), weight).shape == (2, 0, 5)
        assert (torch.ones(2, 3, 4) @ torch.ones(2, 4, 5)).shape == (2, 3, 5)
        assert torch.tanh(torch.zeros(0)).shape == (0,)
    assert torch.equal(invariance.linear(weight[0, :4], weight), invariance.linear(weight[:1], weight)[0])


# attention


class Sequence:
    """Queries, keys and values of one request, and attention over them in chunks."""

    def __init__(self, tokens: int, window: int | None, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.window, self.tokens, self.dtype = window, tokens, dtype
        self.query, self.key, self.value = (
            torch.randn(tokens, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2)
        )

    def seen(self, first: int, last: int) -> slice:
        """The keys that the cache has for the queries from `first` on."""
        return slice(0 if self.window is None else max(0, first - self.window + 1), last)


class Cache(PagedStep):
    """Hands out keys as the paged cache does: each request's, in order."""

    def __init__(self, plan: Any, keys: Tensor, values: Tensor) -> None:
        super().__init__({0: SimpleNamespace(index=0)}, {0: plan})
        self.read = keys, values

    def write_and_read(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self.read


def attend_in_one_step(chunks: list[tuple[Sequence, int, int]], cap: float | None) -> list[Tensor]:
    keys = [sequence.seen(first, last) for sequence, first, last in chunks]
    counts, window, dtype = [own.stop - own.start for own in keys], chunks[0][0].window, chunks[0][0].dtype
    firsts, queries = [first for _, first, _ in chunks], [last - first for _, first, last in chunks]
    none = torch.empty(0, dtype=torch.int64)
    access = CacheAccess(queries, counts, firsts, torch.tensor(counts), none, none, 0, window, dtype)
    plan = plan_invariant_attention(access)
    query, key, value = (
        torch.cat([getattr(sequence, name)[own] for (sequence, _, _), own in zip(chunks, parts, strict=True)])
        for name, parts in (
            ("query", [slice(first, last) for _, first, last in chunks]),
            ("key", keys),
            ("value", keys),
        )
    )
    new = [part.transpose(0, 1)[None] for part in (query, query[:, :2], query[:, :2])]
    module = SimpleNamespace(layer_idx=0)
    step = Cache(plan, key, value)
    output, _ = paged_attention(module, *new, None, 0.3, cap, sliding_window=window, paged_step=step)
    return list(output[0].split(queries))


@pytest.mark.parametrize("cap", [None, 2.0])
@settings(max_examples=25)
@given(
    tokens=st.integers(1, 50),
    cuts=st.lists(st.integers(1, 49), max_size=4),
    other=st.integers(1, 30),
    window=st.none() | st.integers(2, 20),
    dtype=st.sampled_from(DTYPES),
)
def test_attention_in_chunks_beside_others(
    cap: float | None, tokens: int, cuts: list[int], other: int, window: int | None, dtype: str
) -> None:
    sequence = Sequence(tokens, window, getattr(torch, dtype), seed=1)
    neighbour = Sequence(other, window, sequence.dtype, seed=2)
    whole = attend_in_one_step([(sequence, 0, tokens)], cap)[0]
    ends = sorted({cut for cut in cuts if cut < tokens} | {tokens})
    chunks = list(zip([0, *ends], ends, strict=False))
    beside = [
        attend_in_one_step([(neighbour, other - 1, other), (sequence, first, last)], cap)[1] for first, last in chunks
    ]
    assert torch.equal(torch.cat(beside), whole)
    own = torch.arange(tokens)
    visible = (own <= own[:, None]) & (own > own[:, None] - (window or tokens))
    query, key, value = (x.transpose(0, 1).double() for x in (sequence.query, sequence.key, sequence.value))
    logits = 0.3 * query @ key.repeat_interleave(2, 0).mT
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 0)
    most = 1e-5 if dtype == "float32" else 3e-2
    torch.testing.assert_close(whole.double().transpose(0, 1), expected, atol=most, rtol=most)


# the engine


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `experts/{a,b}`: norms and linears of all kinds, a window, soft-capped logits."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save_random(folder / "base", config_of(request.param))
    for seed, name in enumerate("ab"):
        compress(base, save_finetune(folder / f"tuned-{name}", base, seed), folder / "experts" / name)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_is_the_same_alone_and_among_others(served: Path, dtype: str) -> None:
    """Chunks, the prefix cache, more than 16 and 64 tokens of an expert, and rows of all models in one step."""
    draw = random.Random(0)
    prompts = [[draw.randrange(250) for _ in range(length)] for length in (3, 70, 1, 33, 18, 90)]
    names = ["a", "a", "base", "b", "base", "a"]
    options: dict[str, Any] = {"kv_budget": "4MiB", "max_batch_tokens": 48, "exact": True, "dtype": dtype}

    def ask(engine: Engine, chosen: list[int]) -> dict[int, tuple[Tensor, list[int]]]:
        rows = watch(engine)
        answers = engine.generate(
            [prompts[index] for index in chosen],
            expert=[names[index] for index in chosen],
            max_new_tokens=5,
            temperature=1.0,
            seed=7,
        )
        return {
            index: (seen, answer.token_ids) for index, seen, answer in zip(chosen, in_order(rows), answers, strict=True)
        }

    alone: dict[int, tuple[Tensor, list[int]]] = {}
    with Engine(served / "base", experts=served / "experts", **options) as engine:
        for index in range(len(prompts)):
            alone |= ask(engine, [index])
    with Engine(served / "base", experts=served / "experts", **options) as engine:
        for group in (list(range(len(prompts))), draw.sample(range(len(prompts)), 5), [5, 1, 0]):
            for index, (rows, tokens) in ask(engine, group).items():
                assert tokens == alone[index][1]
                assert torch.equal(rows, alone[index][0])
