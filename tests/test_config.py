"""Changed settings: carried by restore, reported by compress, refused by the engine; never ignored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import config_of, save_finetune, save_random
from meswitch.compression.job import compress
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.engine.engine import Engine
from meswitch.errors import ArchitectureError, CheckpointError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.config import config_changes, read_config, text_config

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

COUNTS = [
    ("llama", {"rope_theta": 5e5}, ["rope_parameters"]),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, ["rope_parameters"]),
    ("llama", {"max_position_embeddings": 4096, "rope_theta": 1e6}, ["rope_parameters"]),
    ("llama", {"rms_norm_eps": 1e-3}, ["rms_norm_eps"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act"]),
    ("llama", {"num_attention_heads": 2, "head_dim": 16}, ["head_dim", "num_attention_heads"]),
    ("llama", {"a_field_of_tomorrow": 1}, ["a_field_of_tomorrow"]),
    ("mistral", {"sliding_window": 8}, ["sliding_window"]),
    ("gemma2", {"final_logit_softcapping": 9.0}, ["final_logit_softcapping"]),
    ("gemma2", {"query_pre_attn_scalar": 64}, ["query_pre_attn_scalar"]),
    ("gemma3_text", {"layer_types": ["full_attention", "full_attention"]}, ["layer_types"]),
    ("granite", {"embedding_multiplier": 2.0, "logits_scaling": 3.0}, ["embedding_multiplier", "logits_scaling"]),
    ("qwen3_moe", {"num_experts_per_tok": 1}, ["num_experts_per_tok"]),
    ("qwen3_moe", {"norm_topk_prob": True}, ["norm_topk_prob"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx"]),
]
HARMLESS = [
    ("llama", {"max_position_embeddings": 4096, "use_cache": False, "attention_dropout": 0.1, "vocab_size": 999}),
    ("llama", {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "architectures": ["Other"]}),
    ("llama", {"dtype": "float16", "_name_or_path": "x", "transformers_version": "4.1", "initializer_range": 0.5}),
    ("llama", {"tie_word_embeddings": True, "quantization_config": {"bits": 4}, "id2label": {0: "a"}}),
    ("qwen2", {"max_window_layers": 1}),
    ("mixtral", {"router_aux_loss_coef": 0.5, "output_router_logits": True, "router_jitter_noise": 0.1}),
]


def saved(folder: Path, family: str, **changes: Any) -> dict[str, Any]:
    """The loaded config of a checkpoint whose config.json has these changes."""
    config_of(family, **(MOE if family == "qwen3_moe" else {})).save_pretrained(folder)
    edit(folder, **changes)
    loaded: dict[str, Any] = text_config(folder).to_dict()
    return loaded


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    if changes.keys() & {"rope_theta", "rope_scaling"}:
        config.pop("rope_parameters")  # as older versions wrote it
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(("family", "changes", "expected"), COUNTS)
def test_what_counts(tmp_path: Path, family: str, changes: dict[str, Any], expected: list[str]) -> None:
    base, expert = saved(tmp_path / "base", family), saved(tmp_path / "expert", family, **changes)
    found = config_changes(base, expert)
    assert list(found) == expected
    assert found[expected[0]] == (base.get(expected[0]), expert[expected[0]])
    assert list(config_changes(expert, base)) == expected


@pytest.mark.parametrize(("family", "changes"), HARMLESS)
def test_what_does_not(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    assert not config_changes(saved(tmp_path / "base", family), saved(tmp_path / "expert", family, **changes))


def test_an_old_spelling_is_no_change(tmp_path: Path) -> None:
    new = saved(tmp_path / "new", "llama")
    assert new["rope_parameters"]["rope_theta"] == 10000.0
    assert not config_changes(new, saved(tmp_path / "old", "llama", rope_theta=10000.0))


@pytest.mark.parametrize("other", [{"type": "yarn"}, {"beta_fast": 32.0, "beta_slow": 1}, {"truncate": True}])
def test_rope_settings_are_compared_by_meaning(other: dict[str, Any], tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    plain, odd = saved(tmp_path / "base", "llama"), saved(tmp_path / "expert", "llama")
    plain["rope_parameters"] = yarn | {"rope_type": "yarn"}
    odd["rope_parameters"] = yarn | ({} if "type" in other else {"rope_type": "yarn"}) | other
    assert not config_changes(plain, odd)
    odd["rope_parameters"] |= {"beta_fast": 16}
    assert list(config_changes(plain, odd)) == ["rope_parameters"]


@pytest.mark.parametrize("tied", [False, True])
def test_infinity_and_nan_in_a_config(tied: bool, tmp_path: Path) -> None:
    limits, odd = {"limit": [0.0, float("inf")]}, {"odd": float("nan")}
    for name, seed, fields in (("base", 0, odd), ("finetune", 1, odd | limits)):
        save_random(tmp_path / name, config_of("llama", tie_word_embeddings=tied), seed)
        edit(tmp_path / name, **fields)
    report = compress(tmp_path / "base", tmp_path / "finetune", tmp_path / "delta")
    assert report.config_changes == {"limit": (None, [0.0, float("inf")])}
    assert Delta.open(tmp_path / "delta").manifest["settings"]["config_changes"] == {"limit": [None, [0.0, "Infinity"]]}
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["config_changes"] == {
        "limit": [None, [0.0, "Infinity"]]
    }
    restore(tmp_path / "base", tmp_path / "delta", tmp_path / "restored")
    assert json.loads((tmp_path / "restored" / "config.json").read_text())["limit"] == [0.0, float("inf")]


def test_a_longer_context_counts_where_rope_depends_on_it(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    base = saved(tmp_path / "base", "llama", rope_parameters=yarn)
    longer = saved(tmp_path / "expert", "llama", rope_parameters=yarn, max_position_embeddings=4096)
    assert list(config_changes(base, longer)) == ["max_position_embeddings"]


def test_carried_reported_and_refused(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    shutil.copytree(base, tmp_path / "long")
    edit(tmp_path / "long", rope_theta=3.0, max_position_embeddings=512)
    plain = save_finetune(tmp_path / "plain", base, 1)
    edit(plain, max_position_embeddings=512, use_cache=False, attention_dropout=0.1)
    made = {name: compress(base, tmp_path / name, tmp_path / "experts" / name) for name in ("long", "plain")}
    assert list(made["long"].config_changes) == ["rope_parameters"]
    assert made["plain"].config_changes == {}
    told = Delta.open(tmp_path / "experts/long").manifest["settings"]["config_changes"]
    assert [value["rope_theta"] for value in told["rope_parameters"]] == [10000.0, 3.0]

    restore(base, tmp_path / "experts/long", tmp_path / "restored")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        restored, finetune, bare = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("restored", "long", "base")
        )
    assert torch.equal(restored, finetune)
    assert not torch.allclose(finetune, bare, atol=1e-2)

    with Engine(base, experts=tmp_path / "experts", kv_budget="8MiB", max_batch_tokens=64) as engine:
        said = r"'long' computes differently.*rope_parameters: base .*10000\.0.*expert .*3\.0(.|\n)*meswitch restore"
        with pytest.raises(ArchitectureError, match=said):
            engine.generate("x", expert="long")
        assert engine.generate("x", expert="plain", max_new_tokens=2).expert == "plain"


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\ud800"], ids=["", "{", "[]", "deep", "bytes"])
def test_a_config_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    save_random(tmp_path / "base", config_of("llama"))
    (tmp_path / "base/config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (read_config, Checkpoint.open, lambda folder: compress(folder, folder, tmp_path / "delta")):
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read(tmp_path / "base")
