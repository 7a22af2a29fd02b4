"""The CUDA kernels on a GPU equal `reference.py`, as nvcc compiled them and the driver launches them.

The same tests run on the processor, through the driver of `cuda/host`, but for what only a GPU has. The quickest say
most and come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meswitch import reference
from meswitch.kernels.cuda import CudaKernels
from meswitch.kernels.rows import Rows
from meswitch.site import DeltaSite
from strategies import sites, sparse_sites
from test_cuda_kernels import activations, check, wide_site

GPU = pytest.param("cuda:0", marks=pytest.mark.gpu)
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]


@pytest.fixture(scope="module", params=["cpu", GPU])
def kernels(request: pytest.FixtureRequest) -> CudaKernels:
    if request.param == "cpu":
        return CudaKernels("cpu", driver=request.getfixturevalue("cuda_library"))
    return CudaKernels(request.param)


def linear_of(kernels: CudaKernels, by_slot: Mapping[int, DeltaSite], base: Tensor | None = None) -> CudaKernels:
    """A linear module whose own product is always `base`, with deltas by slot."""
    out, columns = next((site.out_features, site.in_features) for site in by_slot.values())
    module = nn.Linear(columns, out, bias=False, device="meta")
    linear = kernels.linear(module, lambda *_: base, out, columns, many_rows=False)
    for slot, site in by_slot.items():
        linear.set(slot, site)
    kernels.settle()
    return linear


def products(
    kernels: CudaKernels, x: Tensor, slots: Sequence[int], tables: Sequence[Mapping[int, DeltaSite]], begin: float
) -> list[Tensor]:
    """`y [T, rows]` of every table, which held `begin` before its deltas were added."""
    ys, rows = [], Rows(slots, kernels.device)
    for by_slot in tables:
        out = next(iter(by_slot.values())).out_features
        y = torch.full((len(slots), out + 3), begin, dtype=x.dtype, device=kernels.device)[:, :-3]
        linear_of(kernels, by_slot).add(y, x.to(kernels.device), rows)
        ys.append(y.cpu())
    return ys


@pytest.mark.parametrize("group_size", [None, 128, 1000])
@pytest.mark.parametrize("bits", reference.BITS)
def test_every_width_is_the_reference(kernels: CudaKernels, bits: int, group_size: int | None) -> None:
    slots, tables = [0, -1, 0], [{0: wide_site(bits, group_size)}]
    for dtype in (torch.bfloat16, torch.float32) if kernels.device.type == "cuda" else (torch.bfloat16,):
        x = activations(len(slots), 4500, bits, dtype)
        check(products(kernels, x, slots, tables, 1.0), x, slots, tables, 1.0)


@pytest.mark.parametrize("bits", reference.BITS)
def test_bits_depend_on_nothing_but_the_token(kernels: CudaKernels, bits: int) -> None:
    tables = [{0: wide_site(bits, 128), 1: wide_site(bits, 1000)}]
    slots = [0, 1, -1, 0, 0, 1, 0, 0, 0]
    x = activations(len(slots), 4500, 7)
    (together,) = products(kernels, x, slots, tables, 0.0)
    for token, slot in enumerate(slots):
        (alone,) = products(kernels, x[token : token + 1], [slot], tables, 0.0)
        assert torch.equal(alone[0], together[token])


def test_weights_with_one_input_have_the_same_bits_together(kernels: CudaKernels) -> None:
    """The second step computes what the first one found to take the same input in one launch."""
    tables = [{0: wide_site(bits, None, 300, rows)} for bits, rows in zip((1, 2, 4, 8), (130, 33, 64, 7), strict=True)]
    slots = [0, -1] * 5
    x = activations(len(slots), 300, 3)
    bases = [torch.zeros(len(slots), table[0].out_features, device=kernels.device) for table in tables]
    linears = [linear_of(kernels, table, base) for table, base in zip(tables, bases, strict=True)]
    for _ in range(2):
        on_device, rows = x.to(kernels.device), Rows(slots, kernels.device)
        for base in bases:
            base.zero_()
        ys = [linear(on_device, rows).cpu() for linear in linears]
        check(ys, x, slots, tables, 0.0)
        assert all(map(torch.equal, ys, products(kernels, x, slots, tables, 0.0)))


def test_rows_of_a_table_are_the_reference(kernels: CudaKernels) -> None:
    for bits in reference.BITS:
        site = wide_site(bits, 128)
        embedding = kernels.embedding(site.out_features, site.in_features, packed=site)
        ids = torch.arange(site.out_features, device=kernels.device)
        found = embedding.lookup(ids, torch.float32).cpu()
        assert torch.allclose(found, reference.dense(site), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [GPU], indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
def test_large_weights_are_the_reference(kernels: CudaKernels, shape: tuple[int, int]) -> None:
    """Of Mistral-7B, for tokens of more experts than there are multiprocessors for at once."""
    tables = [{slot: wide_site(2 - slot % 2, None, shape[1], shape[0]) for slot in range(4)}]
    slots = [at % 5 - 1 for at in range(32)]
    x = activations(len(slots), shape[1], 5, torch.bfloat16)
    check(products(kernels, x, slots, tables, 0.5), x, slots, tables, 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", [GPU], indirect=True)
def test_a_captured_graph_follows_slots_and_deltas(kernels: CudaKernels) -> None:
    """Slots are read from memory when a graph is replayed, and so are the deltas in them."""
    by_slot: dict[int, DeltaSite] = {0: wide_site(2, None), 1: wide_site(4, 128)}
    linear = linear_of(kernels, by_slot)
    x = activations(6, 4500, 1).to(kernels.device)
    y = torch.zeros(6, 40, device=kernels.device)
    slots = torch.tensor([0, 1, 0, -1, 1, 1], device=kernels.device)

    def step() -> None:
        y.zero_()
        linear.add(y, x, Rows.of_tensor(slots))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for now in ([0, 1, 0, -1, 1, 1], [1, 1, 1, 1, 1, 1], [-1, -1, 0, 0, 0, 0], [-1] * 6):
        slots.copy_(torch.tensor(now))
        graph.replay()
        check([y.cpu()], x.cpu(), now, [by_slot], 0.0)
    by_slot[1] = wide_site(8, None)
    linear.set(1, by_slot[1])
    kernels.settle()
    slots.fill_(1)
    graph.replay()
    check([y.cpu()], x.cpu(), [1] * 6, [by_slot], 0.0)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), bf16=st.booleans())
def test_a_drawn_launch_is_the_reference(kernels: CudaKernels, data: st.DataObject, bf16: bool) -> None:
    first = data.draw(sites() | sparse_sites())
    tables: list[dict[int, DeltaSite]] = [{0: first, 1: data.draw(sites(like=first))}]
    slots = data.draw(st.lists(st.integers(-1, 2), min_size=1, max_size=11))
    dtype = torch.bfloat16 if bf16 else torch.float32
    x = activations(len(slots), first.in_features, data.draw(st.integers(0, 99)), dtype)
    check(products(kernels, x, slots, tables, 2.0), x, slots, tables, 2.0)
