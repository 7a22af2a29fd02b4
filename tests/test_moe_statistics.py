"""What is measured of single MoE experts, by the tokens that their gates send to them, and what that is good for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random
from meswitch.compression.calibration import Calibration, calibrate
from meswitch.compression.hessians import Hessians, inverse_factor
from meswitch.compression.job import compress, quantize
from meswitch.compression.options import CompressOptions
from meswitch.compression.sensitivity import measure_sensitivity
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import rebuild
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.moe import ObservedExperts, input_stack
from meswitch.huggingface.text import load_tokenizer, token_ids

TEXT = "the quick brown fox jumps over the lazy dog, and 12 naps (of 34) make: {a day}; " * 40
INNER = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, **INNER},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "n_routed_experts": 6,
        **INNER,
        **LATENT,
        "num_key_value_heads": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": None,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2},  # transposed, interleaved, with biases
    "nemotron_h": {"n_routed_experts": 6, **INNER, "layers_block_type": ["moe", "attention"]},  # without a gate
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
}
GATE, UP, DOWN = range(3)
LEAVES = {"mixtral": ("w1", "w3", "w2")}


@pytest.fixture(scope="module", params=MOE)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path, Calibration]:
    """Family, a random model of it, text, and what the model sees there."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(TEXT)
    saved = save_random(folder / "model", config_of(request.param, **MOE[request.param]))
    return request.param, saved, folder / "text.txt", calibrate(saved, folder / "text.txt", max_tokens=500, window=50)


def routed(family: str, folder: Path, windows: tuple[Tensor, ...]) -> Iterator[tuple[str, list[Tensor], Tensor]]:
    """By MoE expert: its place in the model, and what its gate, up and down projections read `[rows, in]`.

    Computed with the checkpoint's tensors, from what the module of MoE experts is called with. Rows may be none.
    """
    loaded, calls = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), dict[str, list[Any]]()
    for name, module in loaded.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda _, args, name=name: calls.setdefault(name, []).append(args))
    with torch.no_grad():
        for ids in windows:
            loaded(input_ids=ids[None], use_cache=False)
    checkpoint = Checkpoint.open(folder)
    for name, args in calls.items():
        hidden, chosen = torch.cat([x for x, *_ in args]), torch.cat([index for _, index, _ in args])
        for moe_expert in range(6):
            x = hidden[(chosen == moe_expert).any(1)]
            leaves = LEAVES.get(family, ("gate_proj", "up_proj", "down_proj"))
            place = name.replace("mlp", "block_sparse_moe") if family == "mixtral" else name
            names = [f"{place}.{moe_expert}.{leaf}.weight" for leaf in leaves]
            gate, up = (x @ checkpoint.tensor(names[which]).T for which in (GATE, UP))
            yield name, names, x
            yield name, names[DOWN:], nn.functional.silu(gate) * up


# --- observed one by one -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MOE | OTHERS)
def test_observed_moe_experts_compute_the_same(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family, **(MOE | OTHERS)[family]), dtype=torch.float32)
    module: Any = next(module for module in model.modules() if input_stack(module) is not None)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    width = module.down_proj.shape[2 if module.is_transposed else 1]
    x, seen = torch.randn(20, width, requires_grad=True), list[tuple[str, int, int]]()
    chosen, weights = torch.rand(20, 6)[:, :5].topk(2).indices, torch.rand(20, 2)  # nobody chooses the last
    wanted = module(x, chosen, weights)
    wanted_gradients = torch.autograd.grad(wanted.square().sum(), [x, module.down_proj])
    observed = ObservedExperts(module, lambda stack, e, x, y: seen.append((stack, e, len(x))))
    found = module(x, chosen, weights)
    torch.testing.assert_close(found, wanted)
    gradients = torch.autograd.grad(found.square().sum(), [x, module.down_proj])
    torch.testing.assert_close(gradients, wanted_gradients)
    first = input_stack(module)
    assert seen == [(stack, e, int((chosen == e).sum())) for e in range(5) for stack in (first, "down_proj")]
    observed.remove()
    assert torch.equal(module(x, chosen, weights), wanted) and len(seen) == 10


def test_rows_that_only_fill_up_a_step_are_not_observed() -> None:
    model = AutoModelForCausalLM.from_config(config_of("mixtral", **MOE["mixtral"]), dtype=torch.float32)
    module, seen = model.model.layers[0].mlp.experts, list[int]()
    ObservedExperts(module, lambda stack, e, x, y: seen.append(e))
    out = module(torch.randn(2, 32), torch.tensor([[6, 6], [1, 6]]), torch.ones(2, 2))
    assert seen == [1, 1] and not out[0].any() and out[1].any()
    assert not module(torch.randn(1, 32), torch.tensor([[6, 6]]), torch.ones(1, 2)).any()


# --- moments and factors --------------------------------------------------------------------------------------------


def test_moments_are_those_of_routed_tokens(model: Any) -> None:
    family, folder, _, seen = model
    found = list(routed(family, folder, seen.windows))
    for place in {name for name, *_ in found}:
        own = [(names, x) for name, names, x in found if name == place]
        block = torch.cat([x for names, x in own if len(names) == 3]).square().mean(0)
        inner = torch.cat([x for names, x in own if len(names) == 1]).square().mean()
        for number, (names, x) in enumerate(own):
            if len(names) == 3:
                assert int(seen.moe_expert_tokens[place][number // 2]) == len(x)
            mean = block if len(names) == 3 else inner.expand(x.shape[1])
            expected = (x.square().sum(0) + 16 * mean) / (len(x) + 16)
            for name in names[:2]:
                torch.testing.assert_close(seen.second_moments[name], expected, rtol=1e-4, atol=1e-7)


def test_factors_are_those_of_routed_tokens(model: Any) -> None:
    family, folder, _, seen = model
    hessians, count = Hessians(Checkpoint.open(folder), seen.windows), 0
    for _, names, x in routed(family, folder, seen.windows):
        for name in names[:2]:
            values = hessians.factor(name)
            assert (values is None) == (not len(x))
            if values is None:
                continue
            upper = torch.frombuffer(bytearray(values), dtype=torch.float32).view(x.shape[1], -1)
            expected = inverse_factor(x.T @ x / len(x), len(x))
            torch.testing.assert_close(upper, expected, rtol=2e-3, atol=2e-3 * float(upper.max()))
            count += 1
    assert count > 15


def test_moe_experts_that_nothing_reaches(tmp_path: Path) -> None:
    few = config_of("qwen3_moe", num_experts=32, num_experts_per_tok=1, moe_intermediate_size=16)
    folder = save_random(tmp_path / "model", few)
    (tmp_path / "text.txt").write_text(TEXT[:12])
    seen = calibrate(folder, tmp_path / "text.txt")
    sensitivity = measure_sensitivity(folder, tmp_path / "text.txt", seen)
    [unused, *_] = (seen.moe_expert_tokens["model.layers.0.mlp.experts"] == 0).nonzero().flatten().tolist()
    used = int(seen.moe_expert_tokens["model.layers.0.mlp.experts"].argmax())
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        name, other = (f"model.layers.0.mlp.experts.{which}.{leaf}.weight" for which in (unused, used))
        for values in (seen.second_moments, sensitivity):
            assert bool((values[name] > 0).all()) and bool(values[name].isfinite().all())
        assert float(sensitivity[name].mean()) < float(sensitivity[other].mean())
        stack = name.replace(f".{unused}.{leaf}.weight", ".down_proj" if leaf == "down_proj" else ".gate_up_proj")
        mean = seen.second_moments[stack]
        mean = mean.mean().expand(16) if leaf == "down_proj" else mean
        torch.testing.assert_close(seen.second_moments[name], mean)
        assert Hessians(Checkpoint.open(folder), seen.windows).factor(name) is None
    options = CompressOptions(bpw=15)  # names take as many bytes as these little matrices
    assert quantize(folder, tmp_path / "a", options, calibration=seen, sensitivity=sensitivity).compensated


# --- what it is good for --------------------------------------------------------------------------------------------


def test_compensation_reaches_moe_experts(model: Any, tmp_path: Path) -> None:
    """On text that was not calibrated on."""
    family, base, text, _ = model
    finetune = save_finetune(tmp_path / "finetune", base, seed=1)
    seen = calibrate(finetune, text, max_tokens=2400, window=100)
    held_out = tuple(torch.tensor(token_ids(TEXT, load_tokenizer(base))[2400:3000]).view(-1, 100))
    ours, theirs = Checkpoint.open(base), Checkpoint.open(finetune)
    errors: dict[bool, dict[str, float]] = {}
    for compensate in (False, True):
        out, options = tmp_path / f"{compensate}", CompressOptions(bits=2, compensate=compensate)
        assert compress(base, finetune, out, options, calibration=seen).compensated is compensate
        delta, errors[compensate] = Delta.open(out), {}
        for _, names, x in routed(family, finetune, held_out):
            for name in names[:2] if len(x) > 100 else ():
                wrong = rebuild(delta.sites[name], ours).float() - theirs.tensor(name)
                right = theirs.tensor(name) - ours.tensor(name)
                errors[compensate][name] = float((x @ wrong.T).square().sum() / (x @ right.T).square().sum())
    assert len(errors[True]) > 6
    better = [errors[True][name] < 0.9 * errors[False][name] for name in errors[True]]
    assert sum(better) > 0.8 * len(better)


def test_sensitivity_is_the_cost_of_noise_in_moe_experts(model: Any) -> None:
    """Against the KL that noise of known size really makes, MoE expert by MoE expert."""
    family, folder, text, _ = model
    seen = calibrate(folder, text, max_tokens=1024, window=64)
    found = measure_sensitivity(folder, text, seen, max_tokens=1024, window=64)
    eager = {"experts_implementation": "eager"}  # the grouped products of the others know no float64
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)
    ids = torch.tensor(token_ids(text.read_text(), load_tokenizer(folder))[:1024]).view(-1, 64)
    generator, ratios = torch.Generator().manual_seed(0), []
    experts: Any = loaded.model.layers[-1].mlp.experts
    with torch.no_grad():
        right = loaded(ids).logits.log_softmax(-1)
        use = seen.moe_expert_tokens["model.layers.1.mlp.experts"]
        for moe_expert in use.argsort(descending=True)[:3].tolist():
            leaf = LEAVES.get(family, ("gate_proj", "up_proj", "down_proj"))[DOWN]
            place = f"model.layers.1.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}"
            name, weight = f"{place}.experts.{moe_expert}.{leaf}.weight", experts.down_proj[moe_expert]
            before, measured = weight.clone(), []
            for _ in range(4):
                weight.add_(torch.randn(weight.shape, generator=generator) * 2e-3)
                wrong = loaded(ids).logits.log_softmax(-1)
                measured.append(float((right.exp() * (right - wrong)).sum() / ids.numel()))
                weight.copy_(before)
            predicted = float((found[name][:, None] * seen.second_moments[name] * 4e-6).sum())
            ratios.append(predicted / (sum(measured) / len(measured)))
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios


def test_what_is_used_more_gets_more_bits(tmp_path: Path) -> None:
    config = config_of("qwen3_moe", num_experts=16, num_experts_per_tok=2, moe_intermediate_size=64)
    folder = save_random(tmp_path / "model", config)
    (tmp_path / "text.txt").write_text("the quick brown fox " * 100)
    seen = calibrate(folder, tmp_path / "text.txt", max_tokens=1000)
    sensitivity = measure_sensitivity(folder, tmp_path / "text.txt", seen, max_tokens=1000)
    quantize(folder, tmp_path / "a", CompressOptions(bpw=8), calibration=seen, sensitivity=sensitivity)
    size = torch.zeros(2, 16)
    for name, site in Delta.open(tmp_path / "a").outline.items():
        if ".experts." in name:
            size[int(name.split(".")[2]), int(name.split(".experts.")[1].split(".")[0])] += site.nbytes
    for layer in range(2):
        order = seen.moe_expert_tokens[f"model.layers.{layer}.mlp.experts"].argsort()
        assert float(size[layer, order[8:]].mean()) > 1.2 * float(size[layer, order[:8]].mean())
