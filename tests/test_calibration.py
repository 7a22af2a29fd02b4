"""What calibration reads, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from families import VOCABULARY, config_of, save_random, tokenizer_of
from meswitch.compression.calibration import calibrate
from meswitch.compression.hessians import Hessians
from meswitch.errors import DataError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.text import batches, token_windows

TEXT = "the quick brown fox jumps over the lazy dog, and naps. " * 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of()


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --- windows ------------------------------------------------------------------------------------------------------


@given(texts=st.lists(st.text("abc ", min_size=1), max_size=5), length=st.integers(1, 9), limit=st.integers(1, 40))
def test_windows_are_the_stream_cut_up(texts: list[str], length: int, limit: int) -> None:
    tokenizer = tokenizer_of_once()
    stream: list[int] = []
    for text in texts:
        stream += [tokenizer.eos_token_id] if stream else []
        stream += tokenizer(text)["input_ids"]
    windows = token_windows(texts, tokenizer, length, max_tokens=limit)
    assert [token for window in windows for token in window.tolist()] == stream[:limit]
    assert all(len(window) == length for window in windows[:-1])


_kept: list[Any] = []


def tokenizer_of_once() -> Any:
    if not _kept:
        _kept.append(tokenizer_of())
    return _kept[0]


def test_what_a_template_began_is_not_begun_again(tokenizer: Any) -> None:
    [window] = token_windows(["<s>hi"], tokenizer, 16)
    assert window.tolist().count(tokenizer.bos_token_id) == 1


@given(lengths=st.lists(st.integers(1, 6), max_size=12), budget=st.integers(1, 20))
def test_batches_hold_every_window_once_within_the_budget(lengths: list[int], budget: int) -> None:
    windows = [torch.full((length,), i) for i, length in enumerate(lengths)]
    made = list(batches(windows, budget))
    assert [int(row[0]) for batch in made for row in batch] == list(range(len(lengths)))
    assert all(batch.numel() <= budget or len(batch) == 1 for batch in made)


# --- statistics ---------------------------------------------------------------------------------------------------


def by_hand(model: Any, windows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """E[x²] of every linear module, from inputs kept whole."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0].flatten(0, -2).double())
        )
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    ]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).square().mean(0).float() for name, rows in seen.items()}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "opt", "phi3", "gpt_neox"])
def test_moments_are_those_of_the_inputs(tmp_path: Path, architecture: str) -> None:
    # OPT with linear modules before and after its blocks.
    narrow = {"word_embed_proj_dim": 16} if architecture == "opt" else {}
    folder = save_random(tmp_path / "model", config_of(architecture, **narrow))
    (tmp_path / "a.txt").write_text(TEXT[:100])
    found = calibrate(folder, tmp_path / "a.txt", window=32)
    windows = token_windows([TEXT[:100]], tokenizer_of_once(), 32)
    assert found.tokens == 100
    assert torch.equal(found.token_counts, torch.bincount(torch.cat(windows), minlength=VOCABULARY))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = by_hand(model, windows)
    assert expected.keys() <= found.second_moments.keys()
    for name, moments in expected.items():
        torch.testing.assert_close(found.second_moments[name], moments)


def test_what_cannot_be_streamed_is_run_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that hands its blocks what it made of the hidden states before them."""
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    plain = MixtralRotaryEmbedding.forward

    def skewed(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        cos, sin = plain(self, x, position_ids)
        return cos + x.mean(), sin

    monkeypatch.setattr(MixtralRotaryEmbedding, "forward", skewed)
    folder = save_random(tmp_path / "model", config_of("mixtral", tie_word_embeddings=True))
    with pytest.raises(UnsupportedModelError):
        Hessians(Checkpoint.open(folder), [torch.arange(5)])
    (tmp_path / "a.txt").write_text(TEXT[:100])
    seen = calibrate(folder, tmp_path / "a.txt", window=100)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, moments in by_hand(model, token_windows([TEXT[:100]], tokenizer_of_once(), 100)).items():
        torch.testing.assert_close(seen.second_moments[name], moments)
    assert torch.equal(seen.second_moments["lm_head.weight"], seen.second_moments["model.embed_tokens.weight"])
    for layer in range(2):
        use = seen.moe_expert_tokens[f"model.layers.{layer}.mlp.experts"]
        assert int(use.sum()) == 200
        for name in (name for name in Checkpoint.open(folder).names() if f".{layer}.block_sparse_moe.experts" in name):
            assert bool((seen.second_moments[name] > 0).all())


def test_the_models_own_type(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("llama"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "a.txt").write_text(TEXT[:100])
    wanted = by_hand(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        token_windows([TEXT[:100]], tokenizer_of_once(), 32),
    )
    for change in ({}, {"dtype": None}):
        (folder / "config.json").write_text(json.dumps(config | change))
        found = calibrate(folder, tmp_path / "a.txt", window=32).second_moments
        for name, moments in wanted.items():
            torch.testing.assert_close(found[name], moments, rtol=1e-4, atol=1e-6)


def test_a_tied_embedding_has_the_moments_of_the_head(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("qwen2"))
    (tmp_path / "a.txt").write_text(TEXT)
    found = calibrate(folder, tmp_path / "a.txt", max_tokens=64, window=32)
    head = found.second_moments["lm_head.weight"]
    assert torch.equal(head, found.second_moments["model.embed_tokens.weight"])


def test_a_bare_decoder_has_the_names_of_its_files(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "whole", config_of("gpt2"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.save_pretrained(tmp_path / "bare")
    tokenizer_of_once().save_pretrained(tmp_path / "bare")
    (tmp_path / "a.txt").write_text(TEXT)
    found = calibrate(tmp_path / "bare", tmp_path / "a.txt", max_tokens=64, window=32).second_moments
    assert torch.equal(found["h.0.mlp.c_fc.weight"], found["transformer.h.0.mlp.c_fc.weight"])


def test_the_same_seed_draws_the_same_passages(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("llama"))
    path = lines(tmp_path / "a.jsonl", *({"text": f"{i} {TEXT[: 10 + i]}"} for i in range(60)))
    steps: list[tuple[int, int]] = []
    runs = [
        calibrate(
            folder, path, max_tokens=100, window=16, seed=seed, progress=lambda at: steps.append((at.done, at.total))
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0].token_counts, runs[1].token_counts)
    assert not torch.equal(runs[0].token_counts, runs[2].token_counts)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(runs[0].second_moments[name], runs[1].second_moments[name])
    assert steps[-1] == (100, 100) and [done for done, _ in steps[: len(steps) // 3]] == sorted(
        done for done, _ in steps[: len(steps) // 3]
    )


def test_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("llama", vocab_size=260))
    (tmp_path / "a.txt").write_text("fine <assistant> not")
    with pytest.raises(DataError, match="260"):
        calibrate(folder, tmp_path / "a.txt")


def test_numbers_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        calibrate(save_random(tmp_path / "model", config_of("llama")), tmp_path / "a.txt", max_tokens=0)


def test_a_real_models_channels_differ(family: Any) -> None:
    found = calibrate(family.experts["maths"], family.calibration["maths"], max_tokens=1024, window=256)
    moments = found.second_moments["model.layers.0.mlp.down_proj.weight"]
    assert found.tokens == 1024 and moments.isfinite().all() and (moments > 0).all()
    assert moments.max() > 4 * moments.median()
