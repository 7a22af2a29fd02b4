"""Wrapped modules compute, row by row, what the expert's own module would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from families import quantize, sparse
from meswitch import reference
from meswitch.errors import ArchitectureError, UnsupportedModelError
from meswitch.kernels import products
from meswitch.kernels.cpu import CpuKernels
from meswitch.layers.bank import Bank
from meswitch.layers.install import ExpertLayers
from meswitch.site import ReplacedSite, Site


class Toy(nn.Module):
    """A model of one module, with what `ExpertLayers` asks of a model."""

    base_model_prefix = "model"

    def __init__(self, module: nn.Module, head: nn.Linear | None = None, tied: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.part = module
        self.model.embed = nn.Embedding(10, 8)
        self.lm_head = nn.Linear(8, 10, bias=False) if head is None else head
        if tied:
            self.lm_head.weight = self.model.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _supports_logits_to_keep(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _plain_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meswitch.huggingface.names.get_model_conversion_mapping", lambda model: [])


def moved(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=generator)


def sites_of(module: nn.Module, seed: int, prefix: str = "model.part.", kind: str | None = None) -> list[Site]:
    """A fine-tune of `module`: matrices quantized (or as `kind` says, whole or sparse), vectors whole."""
    sites = []
    for name, parameter in module.named_parameters():
        tuned = moved(parameter, seed)
        if kind == "replaced":
            sites.append(ReplacedSite(name=prefix + name, shape=tuple(tuned.shape), dtype=tuned.dtype, value=tuned))
        elif kind == "sparse" and parameter.dim() > 1:
            sites.append(sparse(prefix + name, parameter.detach(), tuned, transposed=isinstance(module, Conv1D)))
        else:
            sites.append(quantize(prefix + name, parameter.detach(), tuned, transposed=isinstance(module, Conv1D)))
    return sites


def tuned_output(module: nn.Module, sites: list[Site], x: Tensor) -> Tensor:
    """What a whole copy of the fine-tune's module gives."""
    parameters = dict(module.named_parameters())
    state = {site.name.rpartition(".")[2]: site for site in sites}
    return torch.func.functional_call(
        module, {n: reference.restored(state[n], p.detach()) for n, p in parameters.items()}, (x,)
    )


def assert_rows_are_their_own(module: nn.Module, x: Tensor, axis: int = 1, kind: str | None = None) -> None:
    """Rows 0.. of slots [1, −1, 0, 1, −1]: each equals what its own whole module gives."""
    slots = [1, -1, 0, 1, -1]
    layers = ExpertLayers(Toy(module), CpuKernels(exact=True))
    experts = {slot: sites_of(module, slot, kind=kind) for slot in (0, 1)}
    expected = {slot: tuned_output(module, sites, x) for slot, sites in experts.items()}
    expected[-1] = module(x).clone()
    for slot, sites in experts.items():
        layers.check(sites, tied=False)
        layers.install(slot, sites, tied=False)
    layers.step.begin(slots, [])
    y = module(x)
    for row, slot in enumerate(slots):
        torch.testing.assert_close(y.select(axis, row), expected[slot].select(axis, row), atol=1e-5, rtol=1e-5)
    layers.step.end()
    assert torch.equal(module(x), expected[-1])


def norm(kind: Any, width: int) -> nn.Module:
    module: nn.Module = kind(width)
    for parameter in module.parameters():
        parameter.copy_(moved(parameter, 9))
    return module


@pytest.mark.parametrize("kind", [None, "replaced", "sparse"])
@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), lambda: nn.Linear(8, 6, bias=False), lambda: Conv1D(6, 8)])
def test_linear(make: Any, kind: str | None) -> None:
    assert_rows_are_their_own(make(), torch.randn(1, 5, 8), kind=kind)


@pytest.mark.parametrize("tokens", [5, 17])  # on either side of what the kernel for weights of 16 bits takes
def test_a_linear_of_16_bits(tokens: int) -> None:
    module, slots = nn.Linear(96, 40, bias=False).bfloat16(), [1, -1, 0, 1, -1, *[0] * (tokens - 5)]
    layers = ExpertLayers(Toy(module), CpuKernels())
    experts = {slot: sites_of(module, slot) for slot in (0, 1)}
    x = torch.randn(1, tokens, 96).bfloat16()
    for slot, sites in experts.items():
        layers.install(slot, sites, tied=False)
    layers.step.begin(slots, [])
    y = module(x)
    for row, slot in enumerate(slots):
        whole = module.weight.float() if slot < 0 else reference.restored(experts[slot][0], module.weight.float())
        expected = x[0, row].float() @ whole.T
        assert (y[0, row].float() - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.skipif(products.FUSED_TOKENS == 0, reason="no kernel for this processor")
def test_modules_that_take_the_same_input_are_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    product = products.fused_linear

    def counted(x: Tensor, sites: Any) -> list[Tensor]:
        asked.append(len(sites))
        return product(x, sites)

    module = nn.ModuleDict({name: nn.Linear(96, 40, bias=False).bfloat16() for name in "qkv"})
    layers, slots = ExpertLayers(Toy(module), CpuKernels()), [0, -1, 0]
    layers.install(0, [site for site in sites_of(module, 0) if ".v." not in site.name], tied=False)
    layers.install(1, sites_of(module, 1), tied=False)
    monkeypatch.setattr("meswitch.kernels.cpu.fused_linear", counted)

    def step(modules: str, *, apart: bool = False) -> tuple[list[Tensor], list[int]]:
        asked.clear()
        layers.step.begin(slots, [])
        return [module[name](x.clone() if apart else x) for name in modules], asked.copy()

    x = torch.randn(1, 3, 96).bfloat16()
    alone, calls = step("qkv", apart=True)
    assert calls == [1, 1, 1]
    for modules, expected in (
        ("qkv", [1, 1, 1]),  # they meet
        ("qkv", [3]),
        ("qk", [3]),  # one does not come
        ("qvk", [2, 1]),  # and is asked alone
        ("qkv", [3]),
    ):
        found, calls = step(modules)
        assert calls == expected
        for name, y in zip(modules, found, strict=True):
            assert torch.equal(y, alone["qkv".index(name)])
    assert step("qkv", apart=True)[1] == [3, 1, 1]  # another tensor with the same values is another input
    assert [step("qkv")[1] for _ in range(2)] == [[1, 1, 1], [3]]
    layers.remove(1)  # and with it all that was changed in v
    assert [step("qk")[1] for _ in range(2)] == [[3], [2]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("slots", [[1, -1, 0, 1, -1], [1, 1, 1, 1, 1], [1, 0, 0, 1, -1]])
def test_a_prefill_of_one_expert_is_merged(monkeypatch: pytest.MonkeyPatch, slots: list[int], bias: bool) -> None:
    monkeypatch.setattr("meswitch.kernels.cpu.MERGE_TOKENS", 2)
    module = nn.Linear(96, 40, bias=bias)
    layers = ExpertLayers(Toy(module), CpuKernels())
    x, experts = torch.randn(1, 5, 96), {slot: sites_of(module, slot) for slot in (0, 1)}
    expected = {slot: tuned_output(module, sites, x) for slot, sites in experts.items()} | {-1: module(x).clone()}
    for slot, sites in experts.items():
        layers.install(slot, sites, tied=False)
    layers.step.begin(slots, [])
    y = module(x)
    for row, slot in enumerate(slots):
        tolerance = 1e-5 if slots.count(slot) > 1 else 1e-2  # a lone token's activations are rounded
        torch.testing.assert_close(y[0, row], expected[slot][0, row], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, nn.LayerNorm, nn.RMSNorm])
def test_norm(kind: Any) -> None:
    assert_rows_are_their_own(norm(kind, 8), torch.randn(1, 5, 8))


@pytest.mark.parametrize("heads", [3, 5])
def test_norm_of_heads(heads: int) -> None:
    """[1, tokens, heads, width] and its transpose, also where there are as many heads as tokens."""
    x = torch.randn(1, 5, heads, 8)
    assert_rows_are_their_own(norm(LlamaRMSNorm, 8), x)
    assert_rows_are_their_own(norm(LlamaRMSNorm, 8), x.transpose(1, 2), axis=2)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("axis", [1, 2])
def test_tokens_are_told_from_as_many_heads_by_what_the_module_read_first(axis: int, exact: bool) -> None:
    """However they lie in memory."""
    module, slots = norm(LlamaRMSNorm, 8), [1, -1, 0, 1, -1]
    layers = ExpertLayers(Toy(module), CpuKernels(exact=exact))
    experts = {slot: sites_of(module, slot) for slot in (0, 1)}
    inputs = torch.randn(1, 5, 5, 8)
    module(inputs.narrow(axis, 0, 1))  # as one token does when an engine starts
    for x in (inputs, inputs.transpose(1, 2).contiguous().transpose(1, 2)):
        layers.step.end()
        expected = {slot: tuned_output(module, sites, x) for slot, sites in experts.items()} | {-1: module(x).clone()}
        for slot, sites in experts.items():
            layers.install(slot, sites, tied=False)
        layers.step.begin(slots, [])
        y = module(x)
        for row, slot in enumerate(slots):
            torch.testing.assert_close(y.select(axis, row), expected[slot].select(axis, row), atol=1e-5, rtol=1e-5)


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


@pytest.mark.parametrize("kind", [None, "replaced", "sparse"])
@pytest.mark.parametrize("make", [nn.Embedding, Scaled])
def test_embedding(make: Any, kind: str | None) -> None:
    assert_rows_are_their_own(make(10, 8), torch.tensor([[1, 1, 1, 9, 0]]), kind=kind)


class OwnLookup(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(input, self.weight) + 1


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum()


class MoeExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(2, 4, 8))


@pytest.mark.parametrize("module", [OwnLookup(10, 8), Sum(), MoeExperts()])
def test_what_cannot_be_served_is_refused_by_name_and_type(module: nn.Module) -> None:
    sites = sites_of(module, 1, kind="replaced")
    with pytest.raises(UnsupportedModelError, match=rf"model\.part\.\w+.*{type(module).__name__}"):
        ExpertLayers(Toy(module), CpuKernels(exact=True)).check(sites, tied=False)


def test_unknown_and_misshapen_parameters_are_refused() -> None:
    layers = ExpertLayers(Toy(nn.Linear(8, 6)), CpuKernels())
    with pytest.raises(UnsupportedModelError, match=r"model\.other\.weight"):
        layers.check(
            [ReplacedSite(name="model.other.weight", shape=(1,), dtype=torch.float32, value=torch.ones(1))], tied=False
        )
    with pytest.raises(ArchitectureError, match=r"part\.weight.*\(6, 8\).*\(6, 7\)"):
        layers.check(
            [ReplacedSite(name="part.weight", shape=(6, 7), dtype=torch.float32, value=torch.ones(6, 7))], tied=False
        )


def test_names_with_and_without_prefix_are_one() -> None:
    module = nn.Linear(8, 6)
    layers = ExpertLayers(Toy(module), CpuKernels(exact=True))
    assert layers._find("part.weight") == layers._find("model.part.weight") == (module, "weight")


def test_modules_are_given_back() -> None:
    linear, embedding = nn.Linear(8, 6), Scaled(10, 8)
    for module in (linear, embedding):
        layers = ExpertLayers(Toy(module), CpuKernels(exact=True))
        for slot in (0, 1):
            layers.install(slot, sites_of(module, slot), tied=False)
        layers.remove(0)
        assert layers._wrappers
        layers.remove(1)
        assert not layers._wrappers
        assert "forward" not in module.__dict__
        assert type(module) in (nn.Linear, Scaled)


def test_a_step_of_the_base_calls_no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(8, 6)
    layers = ExpertLayers(Toy(module), CpuKernels(exact=True))
    layers.install(0, sites_of(module, 1), tied=False)
    monkeypatch.setattr("meswitch.kernels.cpu.delta_linear", lambda *a, **k: pytest.fail("called"))
    module(torch.randn(1, 3, 8))


def test_rows_that_are_not_the_tokens_are_refused() -> None:
    module = nn.Linear(8, 6)
    layers = ExpertLayers(Toy(module), CpuKernels(exact=True))
    layers.install(0, sites_of(module, 1), tied=False)
    layers.step.begin([0, 0, -1], [0])
    with pytest.raises(UnsupportedModelError, match=r"model\.part.*3.*2"):
        module(torch.randn(1, 2, 8))


def grown(parameter: Tensor, seed: int, rows: int) -> Site:
    tuned = torch.cat([moved(parameter, seed), moved(torch.zeros(rows, parameter.shape[1]), seed)])
    return quantize("lm_head.weight", parameter.detach(), tuned, transposed=False)


def test_head_widens_to_the_largest_vocabulary_in_play() -> None:
    model = Toy(nn.Linear(8, 6))
    layers = ExpertLayers(model, CpuKernels(exact=True))
    sites = {0: grown(model.lm_head.weight, 1, 2), 1: grown(model.lm_head.weight, 2, 3)}
    for slot, site in sites.items():
        layers.check([site], tied=False)
        layers.install(slot, [site], tied=False)
        assert layers.vocabulary_of([site], tied=False) == (10, 12 + slot)
    x = torch.randn(1, 3, 8)
    layers.step.begin([0] * 7, [-1, 0, 1])
    y = model.lm_head(x)[0]
    assert y.shape == (3, 13)
    assert torch.isneginf(y[0, 10:]).all() and torch.isneginf(y[1, 12:]).all()
    for row, slot in ((1, 0), (2, 1)):
        expected = x[0, row] @ reference.restored(sites[slot], model.lm_head.weight.detach()).T
        torch.testing.assert_close(y[row, : len(expected)], expected)
    layers.step.begin([0] * 7, [-1, -1, -1])
    assert model.lm_head(x).shape == (1, 3, 10)


@pytest.mark.parametrize("base_tied", [True, False])
def test_one_site_serves_a_tied_fine_tune(base_tied: bool) -> None:
    model = Toy(nn.Linear(8, 6), tied=base_tied)
    layers = ExpertLayers(model, CpuKernels(exact=True))
    [site] = sites_of(model.model.embed, 3, "model.embed.")
    layers.install(0, [site], tied=True)
    layers.step.begin([0, -1], [0, -1])
    x, whole = torch.randn(1, 2, 8), reference.restored(site, model.model.embed.weight.detach())
    y = model.lm_head(x)[0]
    torch.testing.assert_close(y[0], x[0, 0] @ whole.T)
    torch.testing.assert_close(y[1], x[0, 1] @ model.lm_head.weight.T)
    torch.testing.assert_close(model.model.embed(torch.tensor([[4, 4]]))[0, 0], whole[4])


def test_a_whole_model_outside_a_step_is_the_base() -> None:
    from families import config_of

    model = AutoModelForCausalLM.from_config(config_of("llama")).eval()
    layers = ExpertLayers(model, CpuKernels(exact=True))
    ids = torch.tensor([[1, 2, 3]])
    before = model(ids).logits
    site = sites_of(model.model.layers[0].mlp.up_proj, 1, "model.layers.0.mlp.up_proj.")
    layers.install(0, site, tied=False)
    assert torch.equal(model(ids).logits, before)
    layers.step.begin([0, 0, 0], [0, 0, 0])
    assert not torch.equal(model(ids).logits, before)


def test_a_bank_of_many_slots_is_copied_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda parts: copies.append(1) or cat(parts))
    bank, base = Bank(torch.zeros(4)), torch.zeros(4)
    for slot in range(200):
        bank.set(slot, torch.full((4,), float(slot + 1)))
    assert len(copies) <= 8
    assert [int(bank.value(slot)[0]) for slot in range(200)] == list(range(1, 201))
    assert torch.equal(bank.value(500), base)


def test_an_expert_may_be_checked_while_a_step_runs() -> None:
    """A step puts vectors of another shape into their modules; whoever checks meanwhile sees the base's. What must run
    the module goes through `run`, once."""
    module = norm(LlamaRMSNorm, 8)
    sites, ran = sites_of(module, 0), []

    def run(probe: Any) -> bool:
        ran.append(1)
        found: bool = probe()
        return found

    layers = ExpertLayers(Toy(module), CpuKernels(), run=run)
    layers.check(sites, tied=False)
    for slot in (0, 1):
        layers.install(slot, sites, tied=False)
    wrapper = layers._wrappers["model.part"]
    forward, checked = wrapper.base_forward, []

    def meanwhile(x: Tensor) -> Tensor:
        assert module.weight.shape != (8,)
        layers.check(sites, tied=False)
        assert layers.vocabulary_of(sites, tied=False) == (10, 10)
        checked.append(1)
        output: Tensor = forward(x)
        return output

    wrapper.base_forward = meanwhile
    layers.step.begin([0, 1, -1], [])
    module(torch.randn(1, 3, 8))
    assert checked == [1] and ran == [1]
