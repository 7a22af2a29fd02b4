"""Weights that the base keeps packed, with deltas on them: both backends against the reference, on drawn shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meswitch import _native, reference
from meswitch.huggingface.models import placeholder
from meswitch.kernels import products
from meswitch.kernels.cpu import CpuKernels
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.rows import Rows
from meswitch.kernels.torch import TorchKernels
from meswitch.site import QuantizedSite
from strategies import sites, sparse_sites

BACKENDS: dict[str, Kernels] = {"cpu": CpuKernels(), "exact": CpuKernels(exact=True), "torch": TorchKernels()}


def packed_module(site: QuantizedSite, *, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear module of this shape whose weight lies elsewhere."""
    module = nn.Linear(1, 1, bias=bias, dtype=dtype).requires_grad_(False)
    module.out_features, module.in_features = site.shape
    module.weight = nn.Parameter(placeholder(site.shape, dtype), requires_grad=False)
    if bias:
        module.bias = nn.Parameter(torch.randn(site.out_features).to(dtype), requires_grad=False)
    return module


def linear(kernels: Kernels, module: nn.Linear, site: QuantizedSite, *, many_rows: bool = True) -> Any:
    return kernels.linear(module, module.forward, site.out_features, site.in_features, many_rows=many_rows, packed=site)


def expected_of(module: nn.Linear, base: QuantizedSite, delta: QuantizedSite, x: Tensor, slots: list[int]) -> Tensor:
    y = x.float() @ reference.dense(base).T
    reference.delta_linear(y, x, slots, {1: delta})
    return y if module.bias is None else y + module.bias.float()


def near(found: Tensor, expected: Tensor, share: float) -> bool:
    return bool((found.float() - expected).norm() <= share * expected.norm() + 1e-3)


@settings(max_examples=60)
@given(
    data=st.data(),
    slots=st.lists(st.integers(-1, 1), min_size=1, max_size=20) | st.lists(st.integers(0, 1), min_size=70, max_size=90),
    bias=st.booleans(),
    many_rows=st.booleans(),
)
def test_a_linear_is_the_reference(data: st.DataObject, slots: list[int], bias: bool, many_rows: bool) -> None:
    base = data.draw(sites())
    delta = data.draw(sites(like=base))
    module = packed_module(base, bias=bias)
    x = torch.randn(len(slots), base.in_features)
    expected = expected_of(module, base, delta, x, slots)
    terms = x.abs() @ (reference.dense(base).abs() + reference.dense(delta).abs()).T  # what may cancel
    for name, kernels in BACKENDS.items():
        product = linear(kernels, module, base, many_rows=many_rows)
        product.set(1, delta)
        found = product(x[None], Rows(slots))[0]
        share = 0.01 if name == "cpu" else 1e-5
        assert bool(((found - expected).abs() <= share * terms.max() + 1e-5).all()), name
        alone = product(x, Rows([]))  # outside of a step
        assert bool(((alone - expected_of(module, base, delta, x, [])).abs() <= share * terms.max() + 1e-5).all()), name


@settings(max_examples=30)
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    slots=st.lists(st.integers(-1, 1), min_size=1, max_size=9) | st.just([1] * 64),
)
def test_in_16_bits_too(data: st.DataObject, dtype: torch.dtype, slots: list[int]) -> None:
    base = data.draw(sites())
    delta = data.draw(sites(like=base))
    module = packed_module(base, bias=True, dtype=dtype)
    x = (torch.randn(len(slots), base.in_features) / 16).to(dtype)
    expected = expected_of(module, base, delta, x, slots)
    for name, kernels in BACKENDS.items():
        product = linear(kernels, module, base)
        product.set(1, delta)
        found = product(x, Rows(slots))
        assert found.dtype == dtype and near(found, expected, 0.02), name


@pytest.mark.parametrize("kernels", BACKENDS.values(), ids=BACKENDS)
@settings(max_examples=30)
@given(site=sites() | sparse_sites(), seed=st.integers(0, 99))
def test_a_lookup_is_the_reference(kernels: Kernels, site: QuantizedSite, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, site.out_features, (11,), generator=generator)
    table = kernels.embedding(site.out_features, site.in_features, site)
    assert not table.occupied
    found, expected = table.lookup(ids, torch.float32), reference.dense(site)[ids]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert table.lookup(ids, torch.bfloat16).dtype == torch.bfloat16


@settings(max_examples=40)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_tile_of_both_is_the_reference(data: st.DataObject, dtype: torch.dtype) -> None:
    base = data.draw(sites() | sparse_sites())
    delta = data.draw(sites(like=base))
    start = data.draw(st.integers(0, base.out_features - 1))
    tile = torch.empty(base.out_features - start, base.in_features, dtype=dtype)
    one, other = products.native_matrix(base), products.native_matrix(delta)
    for added, dense in ((None, reference.dense(base)), (other, reference.dense(base) + reference.dense(delta))):
        one.summed(added, start, tile)
        limit = float(dense.abs().max()) * (1e-5 if dtype == torch.float32 else 2**-8) + 1e-6
        assert bool(((tile.float() - dense[start:]).abs() <= limit).all())


@settings(max_examples=30)
@given(data=st.data(), slots=st.lists(st.integers(-1, 1), min_size=1, max_size=30))
def test_a_token_has_the_same_bits_alone_and_among_others(data: st.DataObject, slots: list[int]) -> None:
    """Also in one call with other weights that take the same input."""
    base = data.draw(sites())
    delta = data.draw(sites(like=base))
    table = products.DeltaTable(base.out_features, base.in_features, base)
    table.set(1, delta)
    other = products.DeltaTable(base.out_features, base.in_features, delta)
    weight, second = products.native_matrix(base), products.native_matrix(delta)
    x = torch.randn(len(slots), base.in_features)
    together, others = products.fused_linear(x, [(weight, table, Rows(slots)), (second, other, None)])
    assert torch.equal(others, products.fused_linear(x, [(second, other, None)])[0])
    for token, slot in enumerate(slots):
        alone = products.fused_linear(x[token : token + 1], [(weight, table, Rows([slot]))])[0]
        assert torch.equal(alone, together[token : token + 1])


def test_what_does_not_fit_is_refused() -> None:
    site = QuantizedSite(name="weight", shape=(4, 8), dtype=torch.float32)
    matrix = products.native_matrix(site)
    with pytest.raises(ValueError, match="expected a matrix of"):
        _native.Table(4, 9, matrix)
    x, y = torch.zeros(2, 8), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="or a packed base"):
        _native.base_linear(x, [(_native.Table(4, 8), None, None, y)])
    with pytest.raises(ValueError, match="expected 2 rows, found 3"):
        _native.base_linear(x, [(_native.Table(4, 8, matrix), None, None, torch.zeros(3, 4))])
    with pytest.raises(ValueError, match="2 tokens"):
        _native.base_linear(x, [(_native.Table(4, 8, matrix), None, Rows([0]).native, y)])
    with pytest.raises(ValueError, match="expected rows below 4, found 3 \\+ 2"):
        matrix.summed(None, 3, torch.zeros(2, 8))
    with pytest.raises(ValueError, match="expected 8 columns, found 9"):
        wider = QuantizedSite(name="weight", shape=(4, 9), dtype=torch.float32)
        matrix.summed(products.native_matrix(wider), 0, torch.zeros(2, 8))
    assert matrix.shape == (4, 8)
