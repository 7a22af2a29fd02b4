"""The torch backend equals `reference.py`, on drawn shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meswitch import reference
from meswitch.errors import BackendError, CudaUnavailableError, FormatError
from meswitch.kernels.rows import Rows
from meswitch.kernels.select import select_kernels, usable_device
from meswitch.kernels.torch import TorchKernels, UnpackedRows
from meswitch.site import QuantizedSite
from strategies import sites, sparse_sites

KERNELS = TorchKernels("cpu")


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(
        torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) if expected.numel() else 0)
    )


@settings(max_examples=60)
@given(site=sites() | sparse_sites(), seed=st.integers(0, 99))
def test_rows_are_the_reference(site: QuantizedSite, seed: int) -> None:
    """In any order, and any number of times."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, site.out_features, (17,), generator=generator)
    rows, expected = UnpackedRows(site, torch.device("cpu")), reference.dense(site)
    assert close(rows.rows(wanted), expected[wanted])
    assert close(torch.cat([rows.rows(tile) for tile in rows.tiles()]), expected)


@settings(max_examples=60)
@given(site=sites() | sparse_sites(), slots=st.lists(st.integers(-1, 2), min_size=1, max_size=20), bias=st.booleans())
def test_a_linear_is_the_reference(site: QuantizedSite, slots: list[int], bias: bool) -> None:
    module = nn.Linear(site.in_features, site.out_features, bias=bias).requires_grad_(False)
    linear = KERNELS.linear(module, module.forward, site.out_features, site.in_features, many_rows=True)
    linear.set(1, site)
    assert linear.occupied
    x = torch.randn(len(slots), site.in_features)
    expected = module(x)
    reference.delta_linear(expected, x, slots, {1: site})
    assert close(linear(x, Rows(slots)), expected)
    linear.set(1, None)
    assert not linear.occupied and torch.equal(linear(x, Rows(slots)), module(x))


@settings(max_examples=60)
@given(
    site=sites() | sparse_sites(), slots=st.lists(st.integers(-1, 2), min_size=1, max_size=20), seed=st.integers(0, 99)
)
def test_an_embedding_is_the_reference(site: QuantizedSite, slots: list[int], seed: int) -> None:
    """Ids beyond the delta's rows add nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, site.out_features + 2, (len(slots),), generator=generator)
    table = KERNELS.embedding(site.out_features + 2, site.in_features)
    table.set(1, site)
    y = torch.randn(len(slots), site.in_features, generator=generator)
    expected = y.clone()
    reference.delta_embedding(expected, ids, slots, {1: site})
    table.add(y, ids, Rows(slots))
    assert close(y, expected)


def test_a_delta_of_another_shape_is_refused() -> None:
    site = QuantizedSite(name="weight", shape=(4, 8), dtype=torch.float32)
    for rows, columns in ((3, 8), (4, 9)):
        with pytest.raises(FormatError, match=rf"weight: expected a delta \[{rows}, {columns}\], found \[4, 8\]"):
            KERNELS.embedding(rows, columns).set(0, site)


@pytest.mark.parametrize(
    ("name", "device", "found"), [("auto", "cpu", "cpu"), ("torch", "cpu", "torch"), ("auto", "meta", "torch")]
)
def test_the_quickest_backend_of_a_device_is_chosen(name: str, device: str, found: str) -> None:
    assert select_kernels(name, device).name == found


@pytest.mark.parametrize(("name", "device"), [("fast", "cpu"), ("cpu", "meta")])
def test_a_backend_that_cannot_be_is_refused(name: str, device: str) -> None:
    with pytest.raises(BackendError, match="kernels"):
        select_kernels(name, device)


@pytest.mark.parametrize(("device", "error"), [("nowhere", BackendError), ("cuda:99", CudaUnavailableError)])
def test_a_device_that_is_not_there_is_refused(device: str, error: Any) -> None:
    with pytest.raises(error, match=device) as raised:
        usable_device(device)
    assert error is not CudaUnavailableError or "the driver: " in (raised.value.hint or "")
