"""For each architecture: in a batch of two experts and the base, every request's logits are those of its own
model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from families import VOCABULARY, config_of, save_finetune, save_random
from meswitch.compression.job import compress
from meswitch.compression.options import CompressOptions
from meswitch.delta.restoration import restore
from meswitch.engine.engine import Engine
from meswitch.errors import UnsupportedModelError

SERVED = (
    *("llama", "qwen2", "gemma", "gpt2", "phi3", "qwen3"),
    *("gpt_neox", "olmo2", "cohere", "gemma2", "gemma3_text", "opt"),
)


def watch(engine: Engine) -> dict[str, list[torch.Tensor]]:
    """Every logits row the engine chooses a token from, by request, in order of arrival."""
    seen: dict[str, list[torch.Tensor]] = {}

    def observe(ids: list[str], scores: torch.Tensor) -> None:
        for row, request in enumerate(ids):
            seen.setdefault(request, []).append(scores[row].clone())

    engine._worker.sampler.observe = observe
    return seen


def in_order(seen: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
    """A step's rows are as wide as the largest vocabulary in it; which requests it has depends on what is loaded."""
    requests = sorted(seen.items(), key=lambda item: int(item[0].split("-")[1]))
    return [pad_sequence(rows, batch_first=True, padding_value=-torch.inf) for _, rows in requests]


def alone(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The logits from which `answer` was chosen, by a whole model on its own: `[tokens, vocabulary]`."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def prompts_of(*lengths: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (length,), generator=generator).tolist() for length in lengths]


def serve(folder: Path, base: Path, tuned: dict[str, Path], preset: str = "default") -> tuple[Path, dict[str, Any]]:
    """The experts' folder, and every model that a request may name, whole."""
    models = {"base": AutoModelForCausalLM.from_pretrained(base)}
    for name, path in tuned.items():
        compress(base, path, folder / "experts" / name, CompressOptions(preset=preset))
        restore(base, folder / "experts" / name, folder / "restored" / name)
        models[name] = AutoModelForCausalLM.from_pretrained(folder / "restored" / name)
    return folder / "experts", models


def assert_alike(
    base: Path,
    experts: Path,
    models: dict[str, Any],
    names: list[str],
    prompts: list[list[int]],
    *,
    exact: bool = True,
) -> None:
    """On every backend; the torch one is always exact."""
    for kernels in ("cpu", "torch") if exact else ("cpu",):
        assert_alike_on(kernels, base, experts, models, names, prompts, exact=exact)


def assert_alike_on(
    kernels: str,
    base: Path,
    experts: Path,
    models: dict[str, Any],
    names: list[str],
    prompts: list[list[int]],
    *,
    exact: bool,
) -> None:
    with Engine(base, experts=experts, kv_budget="16MiB", max_batch_tokens=48, exact=exact, kernels=kernels) as engine:
        seen = watch(engine)
        answers = engine.generate(prompts, expert=names, max_new_tokens=8)
    for rows, prompt, name, answer in zip(in_order(seen), prompts, names, answers, strict=True):
        expected = alone(models[name], prompt, answer.token_ids)
        width = expected.shape[1]
        assert torch.isneginf(rows[:, width:]).all()
        most = (1e-3 if exact else 3e-2) * expected.abs().max()  # sums rounded, and norms after them
        assert (rows[:, :width] - expected).abs().max() <= most, name
        if exact:
            assert answer.token_ids == greedy(models[name], prompt, 8), name
        else:  # two tokens may be that near to each other
            chosen = expected[range(len(answer.token_ids)), answer.token_ids]
            assert (expected.max(dim=1).values - chosen).max() <= 2 * most, name
        assert answer.expert == name


@pytest.mark.parametrize("family", SERVED)
def test_mixed_batch_equals_each_model_alone(family: str, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of(family))
    tuned = {name: save_finetune(tmp_path / f"tuned-{name}", base, seed) for seed, name in enumerate("ab", 10)}
    experts, models = serve(tmp_path, base, tuned)
    names, prompts = ["a", "base", "b", "a", "base"], prompts_of(5, 60, 17, 33, 1)
    for exact in (True, False):
        assert_alike(base, experts, models, names, prompts, exact=exact)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_requests_of_equal_and_of_very_different_lengths(family: str, tmp_path: Path) -> None:
    """One batch of attention, padded ones, and neighbours too unlike to be one."""
    base = save_random(tmp_path / "base", config_of(family))
    experts, models = serve(tmp_path, base, {"a": save_finetune(tmp_path / "tuned", base, 10)})
    for lengths in ((9, 9, 9, 9), (100, 2, 3, 90), (1, 1, 30, 25)):
        assert_alike(base, experts, models, ["a", "base", "a", "a"], prompts_of(*lengths))


def test_one_token_runs_first_in_every_module(tmp_path: Path) -> None:
    """By which tokens are told from as many heads."""
    base = save_random(tmp_path / "base", config_of("qwen3"))
    with Engine(base) as engine:
        inputs = engine._worker.layers._first_inputs
        shapes = {name.partition("layers.0.")[2]: first.shape for name, first in inputs.items()}
        assert all(first.shape is not None for name, first in inputs.items() if name.endswith("norm"))
        config = AutoConfig.from_pretrained(base)
        assert shapes["input_layernorm"] == (1, 1, config.hidden_size)
        assert shapes["self_attn.q_norm"] == (1, 1, config.num_attention_heads, config.head_dim)


@pytest.mark.parametrize("base_tied", [True, False])
def test_grown_vocabulary(base_tied: bool, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama", tie_word_embeddings=base_tied))
    tuned = {
        "grown": save_finetune(tmp_path / "tuned-grown", base, 1, grow=5),
        "more": save_finetune(tmp_path / "tuned-more", base, 2, grow=9),
        "plain": save_finetune(tmp_path / "tuned-plain", base, 3),
    }
    experts, models = serve(tmp_path, base, tuned)
    prompts = prompts_of(6, 6, 6, 6)
    prompts[0][2] = VOCABULARY + 4
    prompts[1][3] = VOCABULARY + 8
    assert_alike(base, experts, models, ["grown", "more", "plain", "base"], prompts)


@pytest.mark.parametrize("preset", ["small", "me-switch", "bitdelta"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_preset(family: str, preset: str, tmp_path: Path) -> None:
    """Whole embeddings, low-rank parts and salient rows, beside a vocabulary that grew."""
    base = save_random(tmp_path / "base", config_of(family))
    tuned = {
        "plain": save_finetune(tmp_path / "tuned-plain", base, 1),
        "grown": save_finetune(tmp_path / "tuned-grown", base, 2, grow=3),
    }
    experts, models = serve(tmp_path, base, tuned, preset)
    prompts = prompts_of(7, 21, 9)
    prompts[1][4] = VOCABULARY + 2
    assert_alike(base, experts, models, ["plain", "grown", "base"], prompts)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MOE_FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": MOE | {"head_dim": None, "shared_expert_intermediate_size": 24},
    "qwen3_moe": MOE,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": MOE | {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_moe_experts_and_gates_of_fine_tunes(family: str, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of(family, **MOE_FAMILIES[family]))
    tuned = {name: save_finetune(tmp_path / name, base, seed) for seed, name in enumerate("ab")}
    experts, models = serve(tmp_path, base, tuned)
    for exact in (True, False):
        assert_alike(base, experts, models, ["a", "base", "b", "a"], prompts_of(5, 80, 30, 9), exact=exact)


def save_tied_otherwise(folder: Path, base: Path, *, base_tied: bool) -> Path:
    """A fine-tune of a Llama base that ties its head where the base does not, or the other way round."""
    model = AutoModelForCausalLM.from_pretrained(base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not base_tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    other = AutoModelForCausalLM.from_config(config_of("llama", tie_word_embeddings=not base_tied))
    other.load_state_dict(state)
    other.save_pretrained(folder / "other")
    return save_finetune(folder / "tuned", folder / "other", 5)


@pytest.mark.parametrize("base_tied", [True, False])
def test_fine_tune_that_ties_otherwise(base_tied: bool, tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama", tie_word_embeddings=base_tied))
    tuned = {"other": save_tied_otherwise(tmp_path, base, base_tied=base_tied)}
    experts, models = serve(tmp_path, base, tuned)
    assert_alike(base, experts, models, ["other", "base", "other"], prompts_of(5, 9, 20))


@pytest.mark.parametrize("family", ["stablelm", "falcon", "mamba", "t5"])
def test_refused_by_name(family: str, tmp_path: Path) -> None:
    if family in ("mamba", "t5"):
        config_of(family).save_pretrained(tmp_path)
        save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")  # the class is refused before it is read
    else:
        save_random(tmp_path, config_of(family))
    with pytest.raises(UnsupportedModelError, match=r"(?i)" + family):
        Engine(tmp_path)
