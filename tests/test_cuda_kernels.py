"""The CUDA kernels equal `reference.py`: their own source, compiled for this processor and run whole."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_host
from meswitch import reference
from meswitch.site import DeltaSite, LowRank, LowRankSite, Part, QuantizedSite, Sparse
from strategies import sites, sparse_sites

EMPTY = QuantizedSite(name="empty", shape=(1, 1), dtype=torch.float32)
ORDERS = st.sampled_from([0, 1]) | st.integers(2, 999)


@pytest.fixture(scope="module")
def kernels(cuda_library: Path) -> cuda_host.HostKernels:
    return cuda_host.HostKernels(cuda_library)


def expected_and_error(site: DeltaSite, x: Tensor) -> tuple[Tensor, Tensor]:
    """Δ̂ · x for every token, in double precision, and how far from it the kernels may be.

    x · column_scale is rounded to a multiple of 1 / 32512 of the largest of a slice, so by at most half of that; sums
    of floats add a few of their last bits.
    """
    delta, x = reference.dense(site).double(), x.double()
    error = 2e-6 * x.abs() @ delta.abs().T
    if isinstance(site, QuantizedSite) and site.parts:
        scaled = x if site.column_scales is None else x * site.column_scales.double()
        plain = QuantizedSite(
            name="codes", shape=site.shape, dtype=site.dtype, parts=site.parts, exponent=site.exponent
        )
        slices = scaled.abs().split(cuda_host.SLICE, dim=1)
        steps = torch.cat([part.amax(1, keepdim=True).expand_as(part) for part in slices], dim=1) / 32512
        error += 0.501 * steps @ reference.dense(plain).double().abs().T
    return x @ delta.T, error


def check(ys: list[Tensor], x: Tensor, slots: list[int], sites: list[dict[int, DeltaSite]], begin: float) -> None:
    for y, by_slot in zip(ys, sites, strict=True):
        for token, slot in enumerate(slots):
            if slot not in by_slot:
                assert bool((y[token] == begin).all()), "a token of the base is left alone"
                continue
            expected, error = expected_and_error(by_slot[slot], x[token : token + 1].float())
            rounding = (expected[0] + begin).abs() * (2**-8 if y.dtype == torch.bfloat16 else 2**-22)
            off = (y[token].double() - begin - expected[0]).abs() - error[0] - rounding
            assert float(off.max()) <= 1e-30, f"token {token}: off by {float(off.max()):.3g} more than it may be"


def activations(tokens: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal, with an outlier here and there, in rows that are longer than `columns`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns + seed % 4, generator=generator)
    x[torch.rand(x.shape, generator=generator) < 0.003] *= 50
    return x.to(dtype)[:, :columns]


def wide_site(bits: int, group_size: int | None, columns: int = 4500, rows: int = 40) -> QuantizedSite:
    """More columns than a slice has, and at 40 rows a part that is not padded to a whole tile."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.randn(-(-columns // (group_size or columns)), rows, generator=generator).half()
    part = Part(bits, (2**bits - 1) / 2, reference.pack(codes, bits), scales, group_size)
    return QuantizedSite(name="wide", shape=(rows, columns), dtype=torch.float32, parts=(part,))


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("group_size", [None, 128, 1000])
def test_many_columns_are_the_reference(kernels: cuda_host.HostKernels, bits: int, group_size: int | None) -> None:
    site, slots = wide_site(bits, group_size), [0, 0]
    x, y = activations(2, site.in_features, bits), torch.zeros(2, site.out_features)
    kernels.delta_linear([y], x, slots, [{0: site}], splits=3, order=2 + bits, blocks=5)
    check([y], x, slots, [{0: site}], 0.0)


@pytest.mark.parametrize("bits", reference.BITS)
def test_bits_depend_on_nothing_but_the_token(kernels: cuda_host.HostKernels, bits: int) -> None:
    """The same alone and beside others, in any order of lanes and blocks, on any number of blocks."""
    site, other = wide_site(bits, 300, rows=70), wide_site(3, None, rows=70)
    slots, x = [0, 1, 0, 0, 0, 0], activations(6, site.in_features, 1)
    found = []
    for chosen, order, blocks in (([0], 0, 1), (range(6), 0, 7), (range(6), 1, 2), (range(6), 7, 3), (range(6), 8, 5)):
        y = torch.zeros(len(chosen), 70)
        kernels.delta_linear(
            [y],
            x[list(chosen)],
            [slots[at] for at in chosen],
            [{0: site, 1: other}],
            splits=3,
            order=order,
            blocks=blocks,
        )
        found.append(y)
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1], y) for y in found[2:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_with_its_token(kernels: cuda_host.HostKernels, value: float) -> None:
    site = wide_site(2, None)
    x = activations(2, site.in_features, 5)
    x[0, 7] = value
    y = torch.zeros(2, site.out_features)
    kernels.delta_linear([y], x, [0, 0], [{0: site}])
    assert bool(y[0].isnan().all())
    check([y[1:]], x[1:], [0], [{0: site}], 0.0)


def test_zeros_add_nothing(kernels: cuda_host.HostKernels) -> None:
    site, y = wide_site(2, 64), torch.full((1, 40), 3.0)
    kernels.delta_linear([y], torch.zeros(1, site.in_features), [0], [{0: site}])
    assert bool((y == 3).all())


def test_a_low_rank_site_is_the_reference(kernels: cuda_host.HostKernels) -> None:
    """An imported LoRA: more ranks than a block has warps."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(90, 19, generator=generator).half(), torch.randn(19, 333, generator=generator).half()
    site = LowRankSite(name="lora", shape=(90, 333), dtype=torch.float32, low_rank=LowRank(u, v), exponent=-3)
    x, y = activations(3, 333, 2), torch.zeros(3, 90)
    kernels.delta_linear([y], x, [0, -1, 0], [{0: site}], order=5)
    check([y], x, [0, -1, 0], [{0: site}], 0.0)


def test_four_weights_share_a_launch(kernels: cuda_host.HostKernels) -> None:
    tables: list[dict[int, DeltaSite]] = [
        {0: wide_site(bits, None, 300, rows)} for bits, rows in zip((1, 2, 4, 8), (130, 33, 64, 7), strict=True)
    ]
    x, slots = activations(9, 300, 3), [0] * 9
    ys = [torch.zeros(9, table[0].out_features) for table in tables]
    kernels.delta_linear(ys, x, slots, tables, order=11, blocks=4)
    check(ys, x, slots, tables, 0.0)


def test_every_token_may_have_a_slot_of_its_own(kernels: cuda_host.HostKernels) -> None:
    """More units than a warp has lanes."""
    tables: list[dict[int, DeltaSite]] = [{slot: wide_site(1 + slot % 2, 16, 50, 20) for slot in range(40)}] * 2
    x, slots = activations(40, 50, 4), list(range(40))
    ys = [torch.zeros(40, 20), torch.zeros(40, 20)]
    kernels.delta_linear(ys, x, slots, tables, order=13, blocks=6)
    check(ys, x, slots, tables, 0.0)


def test_one_block_has_many_tiles_of_sparse_rows(kernels: cuda_host.HostKernels) -> None:
    """A warp that is ahead must not overwrite the sums of the tile before."""
    values = torch.arange(1, 601).float().to(torch.float8_e5m2)
    sparse = Sparse(torch.arange(0, 601, 2).int(), torch.full((600,), 7, dtype=torch.uint8), values)
    site = QuantizedSite(name="sparse", shape=(300, 20), dtype=torch.float32, sparse=sparse)
    x = activations(4, 20, 0)
    for order in (3, 5, 7, 9):
        y = torch.zeros(4, 300)
        kernels.delta_linear([y], x, [0] * 4, [{0: site}], blocks=1, order=order)
        check([y], x, [0] * 4, [{0: site}], 0.0)


def test_no_groups_change_nothing(kernels: cuda_host.HostKernels) -> None:
    y = torch.full((2, 40), 1.5)
    kernels.delta_linear([y], activations(2, 4500, 0), [-1, -1], [{0: wide_site(2, None)}])
    assert bool((y == 1.5).all())


def test_an_unknown_kernel_is_refused(kernels: cuda_host.HostKernels) -> None:
    assert kernels._library.host_launch(b"delta_divide", 1, 0, ctypes.byref(cuda_host.LaunchStruct())) == 500


@settings(max_examples=50, deadline=None)
@given(data=st.data(), bf16=st.booleans(), order=ORDERS, blocks=st.integers(1, 9), splits=st.integers(1, 4))
def test_a_launch_is_the_reference(
    kernels: cuda_host.HostKernels, data: st.DataObject, bf16: bool, order: int, blocks: int, splits: int
) -> None:
    """Any mixture of slots, of one or two weights; slot 2 is empty."""
    first = data.draw(sites() | sparse_sites())
    tables: list[dict[int, DeltaSite]] = [{0: first, 1: data.draw(sites(like=first))}]
    if data.draw(st.booleans()):
        tables.append({1: data.draw(sites(like=first))})
    slots = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=11))
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = activations(len(slots), first.in_features, data.draw(st.integers(0, 99)), dtype)
    ys = [torch.full((len(slots), first.out_features + 3), 2.0, dtype=dtype)[:, :-3] for _ in tables]
    kernels.delta_linear(ys, x, slots, tables, order=order, blocks=blocks, splits=splits)
    check(ys, x, slots, tables, 2.0)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), bf16=st.booleans(), order=ORDERS, blocks=st.integers(1, 9))
def test_rows_are_the_reference(
    kernels: cuda_host.HostKernels, data: st.DataObject, bf16: bool, order: int, blocks: int
) -> None:
    """Rows by token of any mixture of slots; slot 2 is empty, and ids may lie beyond the rows."""
    first = data.draw(sites() | sparse_sites())
    by_slot: dict[int, DeltaSite] = {0: first, 1: data.draw(sites(like=first)), 2: EMPTY}
    count = data.draw(st.integers(0, 70))
    slots = data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count))
    ids = data.draw(st.lists(st.integers(-1, first.out_features + 2), min_size=count, max_size=count))
    y = torch.full((count, first.in_features + 3), 2.0, dtype=torch.bfloat16 if bf16 else torch.float32)[:, :-3]
    kernels.delta_rows(y, ids, slots, by_slot, order=order, blocks=blocks)
    for row, (slot, id) in zip(y, zip(slots, ids, strict=True), strict=True):
        known = slot in (0, 1) and 0 <= id < first.out_features
        expected = 2 + (reference.dense(by_slot[slot])[id] if known else torch.zeros(first.in_features))
        check_row(row, expected)


@pytest.mark.parametrize("bits", reference.BITS)
@pytest.mark.parametrize("group_size", [None, 128, 1000])
def test_a_tile_of_many_columns_is_the_reference(
    kernels: cuda_host.HostKernels, bits: int, group_size: int | None
) -> None:
    site = wide_site(bits, group_size, rows=300)
    y = torch.zeros(90, site.in_features)
    kernels.delta_rows(y, 200, 0, {0: site}, order=bits)
    check_row(y, reference.dense(site)[200:290])


def check_row(found: Tensor, expected: Tensor) -> None:
    """Sums of a few floats, rounded once."""
    rounding = 2**-8 if found.dtype == torch.bfloat16 else 2**-20
    off = (found.double() - expected.double()).abs() - rounding * (1 + expected.double().abs())
    assert float(off.max()) <= 0 if off.numel() else True
