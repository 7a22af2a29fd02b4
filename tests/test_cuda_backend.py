"""The CUDA backend from end to end: launches through the driver of `cuda/host`, which runs kernels on the processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random
from meswitch import CompressOptions, _native, compress, quantize, reference, restore
from meswitch.engine import loading
from meswitch.errors import BackendError, CudaUnavailableError, FormatError, UnsupportedModelError
from meswitch.kernels.cuda import MERGE_TOKENS, CudaKernels
from meswitch.kernels.groups import Groups
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.rows import Rows
from meswitch.kernels.select import select_kernels
from meswitch.site import Part, QuantizedSite
from strategies import sites, sparse_sites
from test_engine_families import assert_alike_on, prompts_of, serve

SLOTS = st.lists(st.integers(-1, 2), min_size=1, max_size=11) | st.lists(
    st.integers(-1, 1), min_size=2 * MERGE_TOKENS, max_size=3 * MERGE_TOKENS
)


@pytest.fixture(scope="module")
def kernels(cuda_library: Path) -> CudaKernels:
    return CudaKernels("cpu", driver=cuda_library)


@pytest.fixture
def served_by_cuda(kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines with `kernels="cuda"` have those on the processor."""

    def select(name: str, device: torch.device, *, exact: bool = False) -> Kernels:
        return kernels if name == "cuda" else select_kernels(name, device, exact=exact)

    monkeypatch.setattr(loading, "select_kernels", select)


def close(found: Tensor, expected: Tensor, x: Tensor) -> bool:
    """x is rounded to a 65,000th of its largest value, in every product."""
    most = float(expected.abs().max()) if expected.numel() else 0.0
    rounding = 2e-2 if found.dtype == torch.bfloat16 else 2e-3
    return bool(torch.allclose(found.float(), expected.float(), rtol=rounding, atol=rounding * max(most, 1)))


@settings(max_examples=40)
@given(site=sites() | sparse_sites(), slots=SLOTS, bias=st.booleans(), bf16=st.booleans(), many=st.booleans())
def test_a_linear_is_the_reference(
    kernels: CudaKernels, site: QuantizedSite, slots: list[int], bias: bool, bf16: bool, many: bool
) -> None:
    """Few tokens of an expert by one launch, many by a merged weight."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    module = nn.Linear(site.in_features, site.out_features, bias=bias, dtype=dtype).requires_grad_(False)
    linear = kernels.linear(module, module.forward, site.out_features, site.in_features, many_rows=many)
    linear.set(1, site)
    kernels.settle()
    assert linear.occupied
    x = torch.randn(len(slots), site.in_features, dtype=dtype)
    expected = module(x).float()
    reference.delta_linear(expected, x.float(), slots, {1: site})
    assert close(linear(x, Rows(slots)), expected, x)
    linear.set(1, None)
    assert not linear.occupied and torch.equal(linear(x, Rows(slots)), module(x))


@settings(max_examples=20)
@given(data=st.data(), slots=SLOTS, bias=st.booleans())
def test_a_packed_linear_is_the_reference(
    kernels: CudaKernels, data: st.DataObject, slots: list[int], bias: bool
) -> None:
    base = data.draw(sites())
    site = data.draw(sites(like=base))
    module = nn.Linear(base.in_features, base.out_features, bias=bias).requires_grad_(False)
    linear = kernels.linear(module, module.forward, base.out_features, base.in_features, many_rows=True, packed=base)
    linear.set(0, site)
    kernels.settle()
    x = torch.randn(len(slots), base.in_features)
    expected = x @ reference.dense(base).T + (module.bias if bias else 0)
    reference.delta_linear(expected, x, slots, {0: site})
    assert close(linear(x, Rows(slots)), expected, x)


@settings(max_examples=20)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_modules_with_one_input_are_the_reference(
    kernels: CudaKernels, data: st.DataObject, dtype: torch.dtype
) -> None:
    """The first step shows who they are; later ones compute all with the first. Five of them are two launches."""
    drawn = [data.draw(sites())]
    drawn += [data.draw(sites(like=drawn[0])) for _ in range(4)]
    slots = data.draw(st.lists(st.integers(-1, 1), min_size=1, max_size=9))
    modules = [nn.Linear(site.in_features, site.out_features, bias=False, dtype=dtype) for site in drawn]
    linears = []
    for at, (module, site) in enumerate(zip(modules, drawn, strict=True)):
        module.requires_grad_(False)
        linears.append(kernels.linear(module, module.forward, *module.weight.shape, many_rows=True))
        linears[-1].set(at % 2, site)
    kernels.settle()
    for _ in range(3):
        x, rows = torch.randn(len(slots), drawn[0].in_features, dtype=dtype), Rows(slots)
        for at, (linear, module, site) in enumerate(zip(linears, modules, drawn, strict=True)):
            expected = module(x).float()
            reference.delta_linear(expected, x.float(), slots, {at % 2: site})
            rounding = torch.finfo(dtype).eps * 64
            found = linear(x, rows).float()
            assert torch.allclose(found, expected, rtol=1e-2, atol=float(rounding + 2e-3 * expected.abs().max()))
    assert len(linears[0].followers) == 3 and not linears[1].followers


@settings(max_examples=40)
@given(site=sites() | sparse_sites(), slots=SLOTS, seed=st.integers(0, 99), half=st.booleans())
def test_an_embedding_is_the_reference(
    kernels: CudaKernels, site: QuantizedSite, slots: list[int], seed: int, half: bool
) -> None:
    """Ids beyond the table add nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, site.out_features + 2, (len(slots),), generator=generator)
    table = kernels.embedding(site.out_features, site.in_features, packed=site)
    table.set(1, site)
    kernels.settle()
    y = torch.randn(len(slots), site.in_features, generator=generator).to(torch.float16 if half else torch.float32)
    expected = y.float()
    reference.delta_embedding(expected, ids, slots, {1: site})
    table.add(y, ids, Rows(slots))
    assert close(y, expected, y)
    known = ids.clamp(max=site.out_features - 1)
    assert close(table.lookup(known, torch.bfloat16), reference.dense(site)[known], y)


@given(slots=st.lists(st.integers(-1, 3), min_size=1, max_size=40))
def test_groups_are_the_same_of_numbers_and_of_a_tensor(slots: list[int]) -> None:
    expected, found = Groups.of_tokens(Rows(slots).tokens), Groups.of_tensor(torch.tensor(slots))
    count = int(expected.count)
    assert int(found.count) == count

    def by_group(groups: Groups) -> list[tuple[int, list[int]]]:
        numbers = groups.groups[:count].tolist()
        return [(slot, groups.order[first : first + n].tolist()) for slot, first, n in numbers]

    assert by_group(found) == by_group(expected)
    for most in (1, 2, 7, 100):
        launches = list(expected.launches(most))
        assert sum(int(number) for _, number in launches) == count and all(len(some) <= most for some, _ in launches)


def test_slots_that_only_the_device_knows(kernels: CudaKernels) -> None:
    """As keys of MoE experts: more rows than one launch takes."""
    site = QuantizedSite(
        name="weight",
        shape=(16, 8),
        dtype=torch.float32,
        parts=(
            Part(
                8, 128.0, reference.pack(torch.randint(0, 256, (16, 8), dtype=torch.uint8), 8), torch.ones(1, 16).half()
            ),
        ),
    )
    module = nn.Linear(8, 16)
    linear = kernels.linear(module, module.forward, 16, 8, many_rows=False)
    linear.set(40, site)
    slots = torch.randint(38, 42, (1500,))
    rows = Rows.of_tensor(slots)
    x, y = torch.randn(1500, 8), torch.zeros(1500, 16)
    vars(rows)["launch_groups"] = Groups.of_tensor(slots)
    linear.add(y, x, rows)
    expected = torch.zeros(1500, 16)
    reference.delta_linear(expected, x, slots.tolist(), {40: site})
    assert close(y, expected, x)


def test_what_kernels_cannot_take_is_refused(kernels: CudaKernels) -> None:
    codes = reference.pack(torch.zeros(3, 8, dtype=torch.uint8), 2)
    scales = torch.ones(1, 3).half()

    def site_of(zero: float, shape: tuple[int, int] = (3, 8)) -> QuantizedSite:
        return QuantizedSite(name="weight", shape=shape, dtype=torch.float32, parts=(Part(2, zero, codes, scales),))

    table = kernels.embedding(3, 8)
    with pytest.raises(UnsupportedModelError, match=r"weight: expected 1, 2, 3, 4 or 8 bits .* found 2 bits and 1.25"):
        table.set(0, site_of(1.25))
    with pytest.raises(FormatError, match=r"weight: expected a delta \[3, 8\], found \[4, 8\]"):
        table.set(0, site_of(1.5, (4, 8)))
    with pytest.raises(FormatError):  # fewer codes than rows: nothing on the device would notice
        kernels.embedding(64, 80).set(0, site_of(1.5, (64, 80)))
    with pytest.raises(ValueError, match="expected at most 4 weights, found 5"):
        _native.CudaKernels.workspace([1] * 5, 8, 0, 1)


def test_no_driver_is_said(tmp_path: Path) -> None:
    with pytest.raises(CudaUnavailableError, match="expected the CUDA driver, found none") as raised:
        CudaKernels("cpu", driver=tmp_path / "libnothing.so")
    assert raised.value.hint == "`meswitch doctor` says which kernels, driver and GPUs there are"


@pytest.mark.parametrize(("device", "exact"), [("cpu", False), ("cuda", True)])
def test_the_backend_is_for_one_kind_of_device(device: str, exact: bool) -> None:
    with pytest.raises(BackendError, match="cuda"):
        select_kernels("cuda", device, exact=exact)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_mixed_batch_equals_each_model_alone(family: str, tmp_path: Path, served_by_cuda: None) -> None:
    """Linear modules, transposed ones, a tied head, stacked MoE experts; a prefill long enough to be merged."""
    base = save_random(tmp_path / "base", config_of(family))
    tuned = {name: save_finetune(tmp_path / f"tuned-{name}", base, seed) for seed, name in enumerate("ab", 10)}
    experts, models = serve(tmp_path, base, tuned)
    names, prompts = ["a", "base", "b", "a", "base"], prompts_of(5, 30, 17, 33, 1)
    assert_alike_on("cuda", base, experts, models, names, prompts, exact=False)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_deltas_over_a_quantized_base(family: str, tmp_path: Path, served_by_cuda: None) -> None:
    whole = save_random(tmp_path / "whole", config_of(family))
    tuned = save_finetune(tmp_path / "tuned", whole, 10)
    base = tmp_path / "base"
    quantize(whole, base, CompressOptions(bits=4))
    compress(base, tuned, tmp_path / "experts" / "a")
    restore(base, tmp_path / "experts" / "a", tmp_path / "restored")
    models = {
        "a": AutoModelForCausalLM.from_pretrained(tmp_path / "restored"),
    }
    names, prompts = ["a", "a"], prompts_of(5, 30)
    assert_alike_on("cuda", base, tmp_path / "experts", models, names, prompts, exact=False)
