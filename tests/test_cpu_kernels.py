"""The native CPU kernels equal `reference.py`, on drawn shapes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forks import forked
from meswitch import reference
from meswitch.errors import FormatError
from meswitch.kernels import products
from meswitch.kernels.rows import Rows
from meswitch.site import Part, QuantizedSite, Sparse
from strategies import sites, sparse_sites


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    if not expected.numel():
        return True
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6))


@settings(max_examples=60)
@given(site=sites() | sparse_sites())
def test_unpacked_rows_are_the_reference(site: QuantizedSite) -> None:
    tile = torch.full((site.out_features, site.in_features), 7.0)
    products.native_matrix(site).dense(0, tile)
    assert close(tile, reference.dense(site))


@settings(max_examples=60)
@given(site=sites() | sparse_sites(), slots=st.lists(st.integers(-1, 2), max_size=40), seed=st.integers(0, 99))
def test_linear_is_the_reference(site: QuantizedSite, slots: list[int], seed: int) -> None:
    table = products.DeltaTable(site.out_features, site.in_features)
    table.set(1, site)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots), site.in_features, generator=generator)
    y = torch.randn(len(slots), site.out_features, generator=generator)
    expected, rounded = y.clone(), y.clone()
    reference.delta_linear(expected, x, slots, {1: site})
    products.delta_linear(y, x, Rows(slots), table, exact=True)
    assert close(y, expected)
    products.delta_linear(rounded, x, Rows(slots), table)
    # No activation is further than half a step from its own, and no step larger than a 127th of the largest.
    scaled = x if site.column_scales is None else x * site.column_scales.float()
    levels = reference.dense(replace(site, column_scales=None, salient=None, low_rank=None))
    largest = scaled.abs().amax(dim=1, keepdim=True) / 254
    # The rest is the order of float32 sums, which may cancel.
    order = 1e-5 * (1 + (y.abs().max() if y.numel() else 0))
    assert bool(((rounded - y).abs() <= 1.01 * largest * levels.abs().sum(dim=1) + order).all())


@settings(max_examples=60)
@given(
    site=sites() | sparse_sites(),
    tokens=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_base_and_delta_together_are_the_reference(
    site: QuantizedSite, tokens: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, site.in_features, generator=generator).to(dtype)
    weight = torch.randn(site.out_features, site.in_features, generator=generator).to(dtype)
    own = torch.randn(site.out_features, generator=generator).to(dtype) if bias else None
    restored = (weight.float() + reference.dense(site)).to(dtype).float()
    expected = x.float() @ restored.T + (0 if own is None else own.float())
    found = products.merged_linear(x, weight, products.native_matrix(site), own)
    assert found.dtype == dtype
    assert close(found.float(), expected, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("columns", [576, 4096])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("bits", reference.BITS)
def test_rounding_costs_less_than_a_hundredth(bits: int, group_size: int | None, columns: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (256, columns), generator=generator).to(torch.uint8)
    scales = torch.rand(-(-columns // (group_size or columns)), 256, generator=generator).half()
    part = Part(bits, (2**bits - 1) / 2, reference.pack(codes, bits), scales, group_size)
    site = QuantizedSite(name="plain", shape=(256, columns), dtype=torch.float32, parts=(part,))
    table = products.DeltaTable(256, columns)
    table.set(0, site)
    x = torch.randn(6, columns, generator=generator)
    x[1, 7] *= 50  # one channel
    x[2, ::101] *= 50  # a few
    x[3] *= torch.randn(columns, generator=generator)  # heavy tails
    x[4, 5:9] *= 1000
    y = torch.zeros(6, 256)
    products.delta_linear(y, x, Rows([0] * 6), table)
    expected = x @ reference.dense(site).T
    assert bool(((y - expected).norm(dim=1) < 0.01 * expected.norm(dim=1)).all())


@settings(max_examples=40)
@given(site=sites() | sparse_sites(), slots=st.lists(st.integers(-1, 1), min_size=1, max_size=9), data=st.data())
def test_embedding_is_the_reference(site: QuantizedSite, slots: list[int], data: st.DataObject) -> None:
    id_ = st.integers(0, 80) | st.integers(0, 620)
    ids = torch.tensor(data.draw(st.lists(id_, min_size=len(slots), max_size=len(slots))))
    table = products.DeltaTable(site.out_features, site.in_features)
    table.set(0, site)
    y = torch.zeros(len(slots), site.in_features)
    expected = y.clone()
    reference.delta_embedding(expected, ids, slots, {0: site}, scale=2.5)
    products.delta_embedding(y, ids, Rows(slots), table, scale=2.5)
    assert close(y, expected)


def plain_site(out: int = 8, columns: int = 40, bits: int = 2) -> QuantizedSite:
    codes = torch.randint(0, 2**bits, (out, columns), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    part = Part(bits, (2**bits - 1) / 2, reference.pack(codes, bits), torch.ones(1, out).half())
    return QuantizedSite(name="plain", shape=(out, columns), dtype=torch.float32, parts=(part,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations(dtype: torch.dtype) -> None:
    site = plain_site()
    table = products.DeltaTable(8, 40)
    table.set(0, site)
    x, y = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype), torch.zeros(3, 8, dtype=dtype)
    products.delta_linear(y, x, Rows([0, -1, 0]), table)
    expected = (x.float() @ reference.dense(site).T).to(dtype)
    assert torch.allclose(y[0], expected[0], atol=0.05, rtol=0.02)
    assert not y[1].any()


def test_a_wider_output_keeps_its_other_columns() -> None:
    table = products.DeltaTable(8, 40)
    table.set(0, plain_site())
    y = torch.full((2, 11), 5.0)
    products.delta_linear(y, torch.randn(2, 40), Rows([0, 0]), table)
    assert bool((y[:, 8:] == 5).all())


def linear(x: Tensor, weight: Tensor, table: products.DeltaTable, rows: Rows | None = None) -> Tensor:
    return products.fused_linear(x, [(weight, table, rows)])[0]


@pytest.mark.skipif(products.FUSED_TOKENS == 0, reason="no kernel for this processor")
@given(
    site=sites() | sparse_sites(),
    slots=st.lists(st.integers(-1, 2), min_size=1, max_size=products.FUSED_TOKENS),
    seed=st.integers(0, 2**31),
)
def test_a_base_of_16_bits_and_the_deltas_on_it(site: QuantizedSite, slots: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table, rows = products.DeltaTable(site.out_features, site.in_features), Rows(slots)
    table.set(1, site)
    # Not at the start of its memory.
    weight = torch.randn(site.out_features + 1, site.in_features, generator=generator).bfloat16()[1:]
    x = torch.randn(len(slots), site.in_features, generator=generator).bfloat16()
    assert products.has_fused_kernel(weight) and not products.has_fused_kernel(weight.float())
    base = (x.double() @ weight.T.double()).float()
    added = torch.zeros_like(base)
    products.delta_linear(added, x, rows, table)
    room = (x.double().abs() @ weight.T.double().abs()).float() * 1e-6 + added.abs() * 1e-5
    alone = linear(x, weight, table)
    assert bool(((alone.float() - base).abs() <= room + base.abs() * 2**-8).all())
    together = linear(x, weight, table, rows)
    assert bool(((together.float() - base - added).abs() <= room + (base + added).abs() * 2**-8 + 1e-6).all())
    for token, slot in enumerate(slots):  # the same bits alone and among others
        one = x[token : token + 1]
        assert torch.equal(linear(one, weight, table), alone[token : token + 1])
        assert torch.equal(linear(one, weight, table, Rows([slot])), together[token : token + 1])


@pytest.mark.skipif(products.FUSED_TOKENS == 0, reason="no kernel for this processor")
@given(
    site=sites() | sparse_sites(), slots=st.lists(st.integers(-1, 2), min_size=1, max_size=6), seed=st.integers(0, 99)
)
def test_weights_with_the_same_input_give_the_same_bits_together(
    site: QuantizedSite, slots: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(slots), site.in_features, generator=generator).bfloat16()
    other = replace(site, column_scales=None if site.column_scales is None else site.column_scales * 1.5)
    asked: list[tuple[Tensor, products.DeltaTable, Rows | None]] = []
    for own in (site, site, other, None):
        table = products.DeltaTable(site.out_features, site.in_features)
        table.set(1, own)
        table.set(2, None if own is site else own)
        weight = torch.randn(site.out_features, site.in_features, generator=generator).bfloat16()
        asked.append((weight, table, None if own is None else Rows(slots)))
    for found, alone in zip(products.fused_linear(x, asked), asked, strict=True):
        assert torch.equal(found, linear(x, *alone))
    assert products.fused_linear(x, []) == []


@pytest.mark.skipif(products.FUSED_TOKENS == 0, reason="no kernel for this processor")
@pytest.mark.parametrize("columns", [2048, 2600])
def test_a_token_gives_the_same_bits_in_long_rows(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight, x = (torch.randn(rows, columns, generator=generator).bfloat16() for rows in (301, products.FUSED_TOKENS))
    table = products.DeltaTable(301, columns)
    for tokens in range(1, products.FUSED_TOKENS + 1):
        found = linear(x[:tokens], weight, table)
        assert torch.equal(found[-1:], linear(x[tokens - 1 : tokens], weight, table))


def test_rows_beyond_a_delta_are_not_merged() -> None:
    site = QuantizedSite(
        name="drawn", shape=(3, 8), dtype=torch.float32, sparse=Sparse(*map(torch.tensor, ([0] * 4, [], [])))
    )
    with pytest.raises((ValueError, FormatError)):
        products.merged_linear(torch.zeros(1, 8), torch.zeros(4, 8), products.native_matrix(site))


def test_a_base_product_refuses_too_many_tokens_and_other_shapes() -> None:
    weight, table = torch.zeros(4, 8, dtype=torch.bfloat16), products.DeltaTable(4, 8)
    x = torch.zeros(1, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"17 tokens, at most \d+, found"):
        linear(x.repeat(17, 1), weight, table)
    with pytest.raises(ValueError, match=r"32 weights .* found \(8, 24, 1\)"):
        linear(x, weight[:3], table)
    with pytest.raises(ValueError, match=r"1 tokens, .* found \(8, 32, 2\)"):
        linear(x, weight, table, Rows([0, 0]))
    with pytest.raises(ValueError, match="8 columns"):
        products.fused_linear(
            x, [(weight, table, None), (torch.zeros(4, 9, dtype=torch.bfloat16), products.DeltaTable(4, 9), None)]
        )
    with pytest.raises(ValueError, match="rows of at least 8 elements, found 7"):
        linear(x[:, :7], weight, table)


def test_wrong_shapes_are_refused() -> None:
    table = products.DeltaTable(8, 40)
    table.set(0, plain_site())
    with pytest.raises(ValueError, match="expected rows of at least 40 elements, found 39"):
        products.delta_linear(torch.zeros(2, 8), torch.zeros(2, 39), Rows([0, 0]), table)
    with pytest.raises(ValueError, match="expected 3 rows, found 2"):
        products.delta_linear(torch.zeros(2, 8), torch.zeros(2, 40), Rows([0, 0, 0]), table)
    with pytest.raises(ValueError, match="neighbouring"):
        products.delta_linear(torch.zeros(8, 2).T, torch.zeros(2, 40), Rows([0, 0]), table)
    with pytest.raises(ValueError, match="float32"):
        products.delta_linear(torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 40), Rows([0]), table)


def test_a_forked_process_works_alone() -> None:
    table = products.DeltaTable(1024, 1024)
    codes = torch.randint(0, 4, (1024, 1024)).to(torch.uint8)
    part = Part(2, 1.5, reference.pack(codes, 2), torch.ones(1, 1024).half())
    table.set(0, QuantizedSite(name="big", shape=(1024, 1024), dtype=torch.float32, parts=(part,)))
    x, rows = torch.randn(1, 1024), Rows([0])
    y, again = torch.zeros(1, 1024), torch.zeros(1, 1024)
    products.delta_linear(y, x, rows, table)

    def work() -> None:
        products.delta_linear(again, x, rows, table)
        assert again.numpy().tobytes() == y.numpy().tobytes()

    assert forked(work) == 0


TEAM = """
import os, torch
from meswitch import reference
from meswitch.kernels import products
from meswitch.site import Part, QuantizedSite

rows = torch.arange(1024).int()
codes = torch.randint(0, 4, (1024, 1024)).to(torch.uint8)
part = Part(2, 1.5, reference.pack(codes, 2), torch.ones(1, 1024).half(), rows=rows)
table = products.DeltaTable(2048, 1024)
table.set(0, QuantizedSite(name="big", shape=(2048, 1024), dtype=torch.float32, parts=(part,)))

def multiply():
    products.delta_linear(torch.zeros(1, 2048), torch.ones(1, 1024), products.Rows([0]), table)

torch.ones(1 << 22).exp()
threads = len(os.listdir("/proc/self/task"))
multiply()
assert len(os.listdir("/proc/self/task")) == threads, "kernels have a team of their own"
rows[1000] = 3_000_000  # what nobody may do: the kernel panics on one thread of the team
try:
    multiply()
except RuntimeError as error:
    assert "a bug in meswitch" in str(error), error
else:
    raise AssertionError("expected an error")
rows[1000] = 1000
multiply()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("first", ["libgomp.so.1", None])
def test_kernels_run_on_torchs_threads_and_survive_a_panic_there(first: str | None) -> None:
    try:
        ctypes.CDLL(first)
    except OSError:
        pytest.skip(f"no {first} on this system")
    load = f"import ctypes; ctypes.CDLL({first!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", f"{load}\n{TEAM}"], env=environment, check=True)


def test_a_site_whose_tensors_do_not_fit_is_refused() -> None:
    site = plain_site()
    short = Part(2, 1.5, site.parts[0].codes[:-1], site.parts[0].scales)
    beyond = Part(2, 1.5, site.parts[0].codes, site.parts[0].scales, rows=torch.arange(1, 9).int())
    values = torch.ones(3).to(torch.float8_e5m2)
    gaps = torch.tensor([5, 255, 1], dtype=torch.uint8)
    for starts in ([0, 1, 2], [0, 2, 1, 3], [0, 1, 1, 4]):
        sparse = Sparse(torch.tensor(starts).int(), gaps, values)
        with pytest.raises(FormatError, match="rows of sparse entries"):
            products.native_matrix(QuantizedSite(name="broken", shape=(3, 40), dtype=torch.float32, sparse=sparse))
    some = Part(2, 1.5, site.parts[0].codes, site.parts[0].scales, rows=torch.arange(8).int())
    for parts, what in (
        ((short,), "bytes of codes"),
        ((beyond,), "rising indices below 8"),
        ((site.parts[0], some), "row 0 in two"),
    ):
        with pytest.raises(FormatError, match=what):
            products.native_matrix(QuantizedSite(name="broken", shape=(8, 40), dtype=torch.float32, parts=parts))
