"""One folder, one reading: what a checkpoint holds is what transformers loads of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from families import config_of, save_random, tokenizer_of
from meswitch import (
    CompressOptions,
    Delta,
    calibrate,
    compress,
    import_adapter,
    measure_sensitivity,
    restore,
)
from meswitch.errors import ArchitectureError, CheckpointError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import load_model
from test_adapter import save_adapter

NAME = "model.layers.0.mlp.up_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def loaded(folder: Path) -> dict[str, Tensor]:
    """What transformers loads, without a left-over adapter."""
    state: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return state


def save_in_shards(folder: Path, seed: int) -> Path:
    """A random checkpoint in several files."""
    model = AutoModelForCausalLM.from_pretrained(
        save_random(folder.with_name(f"{folder.name}-whole"), config_of("llama"), seed)
    )
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def same(checkpoint: Checkpoint, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(checkpoint.tensor(name), state[name]) for name in checkpoint.names())


@pytest.mark.parametrize("case", ["a whole file over shards", "shards over a whole file", "an index without shards"])
def test_the_file_is_the_one_that_transformers_takes(case: str, tmp_path: Path) -> None:
    folder, other = tmp_path / "model", save_random(tmp_path / "other", config_of("llama"), seed=2)
    if case == "shards over a whole file":
        save_random(folder, config_of("llama"), seed=1)
        AutoModelForCausalLM.from_pretrained(other).save_pretrained(folder, max_shard_size="20KB")
    else:
        save_in_shards(folder, seed=1)
        shutil.copy(other / WEIGHTS, folder)
    if case == "an index without shards":
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()
    taken, checkpoint = loaded(folder), Checkpoint(folder)
    assert (folder / INDEX).is_file()
    assert torch.equal(taken[NAME], loaded(other)[NAME]) == (case != "shards over a whole file")
    assert same(checkpoint, taken)
    assert same(checkpoint, load_model(checkpoint).state_dict())


def test_of_a_tensor_in_two_shards_the_last_counts(tmp_path: Path) -> None:
    folder = save_in_shards(tmp_path / "model", seed=1)
    last = max(folder.glob("model-*.safetensors"))
    file_of = json.loads((folder / INDEX).read_text())["weight_map"]
    assert file_of[NAME] != last.name
    write_tensors(last, load_file(last) | {NAME: torch.ones(48, 32)})
    assert torch.equal(loaded(folder)[NAME], torch.ones(48, 32))
    assert same(Checkpoint(folder), loaded(folder))


def test_a_file_that_the_config_names(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("llama"), seed=1)
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    save_random(tmp_path / "unread", config_of("llama"), seed=2)
    shutil.copy(tmp_path / "unread" / WEIGHTS, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    assert same(Checkpoint(folder), load_file(folder / "other.safetensors"))
    assert same(Checkpoint(folder), loaded(folder))
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "../unread/model.safetensors"}))
    with pytest.raises(CheckpointError, match="without folders"):
        Checkpoint(folder)


def test_adapter_files_beside_a_model_are_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_random(tmp_path / "model", config_of("llama"))
    adapter = save_adapter(folder, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    model = load_model(Checkpoint(folder))
    assert set(model.state_dict()) == set(load_file(folder / WEIGHTS))
    assert same(Checkpoint(folder), model.state_dict())
    assert "adapter files beside the model are not loaded" in caplog.text
    left_out, equal = compress(folder, save_random(tmp_path / "same", config_of("llama")), tmp_path / "delta").notes
    assert f"adapter files in {folder} are left out" in left_out and "no weight differs" in equal
    other = save_random(tmp_path / "other", config_of("llama"), seed=5)
    assert compress(folder, other, tmp_path / "other-delta").notes == (left_out,)


def test_an_adapter_alone_is_for_import(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="meswitch import"):
        compress(base, adapter, tmp_path / "delta")


# --- base and fine-tune under one set of names ---------------------------------------------------------------------


def rename(folder: Path, edit: Callable[[str], str]) -> None:
    write_tensors(folder / WEIGHTS, {edit(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()})


def restored(base: Path, finetune: Path) -> Path:
    """The fine-tune as it comes back, at 8 bits a weight."""
    root = finetune.parent
    compress(base, finetune, root / "delta", CompressOptions(bits=8))
    restore(base, root / "delta", root / "restored")
    return root / "restored"


def near(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether every weight is the same up to a quantization error; unrelated models differ by more than 1."""
    assert one.keys() == other.keys()
    return all(float((one[name] - other[name]).norm()) <= 0.3 * float(other[name].norm()) for name in one)


def vision_language(seed: int, folder: Path) -> Path:
    config = AutoConfig.for_model(
        "gemma3",
        text_config=config_of("gemma3_text").to_dict(),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def newer_vision_language_name(name: str) -> str:
    if name.startswith("language_model.model."):
        return name.replace("language_model.model.", "model.language_model.")
    return f"model.{name}"


@pytest.mark.parametrize("side", ["base", "finetune"])
@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_names_that_load_alike(family: str, side: str, tmp_path: Path) -> None:
    save = vision_language if family == "gemma3" else lambda seed, folder: save_random(folder, config_of(family), seed)
    base, finetune = (save(seed, tmp_path / name) for seed, name in enumerate(("base", "finetune")))
    changed = newer_vision_language_name if family == "gemma3" else lambda name: name.removeprefix("transformer.")
    rename(tmp_path / side, changed)
    assert set(load_file(base / WEIGHTS)) != set(load_file(finetune / WEIGHTS))
    assert near(loaded(restored(base, finetune)), loaded(finetune))
    assert set(load_file(tmp_path / "restored" / WEIGHTS)) == set(load_file(base / WEIGHTS))


def test_a_bare_decoder_is_the_whole_of_a_tied_model(tmp_path: Path) -> None:
    config = config_of("llama", tie_word_embeddings=True)
    base, finetune = (save_random(tmp_path / name, config, seed) for seed, name in enumerate(("base", "finetune")))
    wanted = loaded(finetune)
    rename(finetune, lambda name: name.removeprefix("model."))
    assert near(loaded(restored(base, finetune)), wanted)


def measured(finetune: Path, base: Path, out: Path, options: CompressOptions) -> list[dict[str, Any]]:
    """The sites of a delta for which calibration and sensitivity were measured on the fine-tune."""
    text = out.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 20)
    calibration = calibrate(finetune, text, max_tokens=256, window=64)
    sensitivity = measure_sensitivity(finetune, text, calibration, max_tokens=128, window=64)
    compress(base, finetune, out, options, calibration=calibration, sensitivity=sensitivity)
    sites: list[dict[str, Any]] = Delta.open(out).manifest["sites"]
    return sites


@pytest.mark.parametrize(
    ("side", "options"),
    # The base's names are stored, and of other length they leave method auto other bytes.
    [("base", CompressOptions()), ("finetune", CompressOptions()), ("finetune", CompressOptions(bpw=9))],
    ids=["base", "finetune", "finetune-auto"],
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_what_is_measured_counts_under_other_names(
    family: str, side: str, options: CompressOptions, tmp_path: Path
) -> None:
    config = None if family == "gemma3" else config_of(family, tie_word_embeddings=True)
    save = vision_language if config is None else lambda seed, folder: save_random(folder, config, seed)
    base, finetune = (save(seed, tmp_path / name) for seed, name in enumerate(("base", "finetune")))
    if config is None:
        tokenizer_of().save_pretrained(finetune)
    expected = measured(finetune, base, tmp_path / "expected", options)

    def changed(name: str) -> str:
        return newer_vision_language_name(name) if config is None else name.partition(".")[2]

    rename(tmp_path / side, changed)
    found = measured(finetune, base, tmp_path / "found", options)
    for site, like in zip(found, expected, strict=True):
        assert site.pop("name") == (changed(like["name"]) if side == "base" else like["name"])
        assert site == {name: value for name, value in like.items() if name != "name"}


def test_stacked_moe_experts_of_a_base_that_has_them_one_by_one(tmp_path: Path) -> None:
    config = config_of("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    base, finetune = (save_random(tmp_path / name, config, seed) for seed, name in enumerate(("base", "finetune")))
    AutoModelForCausalLM.from_pretrained(finetune).save_pretrained(tmp_path / "stacked", save_original_format=False)
    compress(base, finetune, tmp_path / "single-delta")
    compress(base, tmp_path / "stacked", tmp_path / "stacked-delta")
    single, stacked = (Delta.open(tmp_path / name) for name in ("single-delta", "stacked-delta"))
    assert single.manifest["sites"] == stacked.manifest["sites"]
    assert any(".experts.3.up_proj." in name for name in stacked.sites)
    tokenizer_of().save_pretrained(tmp_path / "stacked")
    sites = [
        measured(folder, base, tmp_path / f"{folder.name}-measured", CompressOptions())
        for folder in (finetune, tmp_path / "stacked")
    ]
    assert sites[0] == sites[1] != single.manifest["sites"]
    with pytest.raises(ArchitectureError, match=r"layout of the base, which has .*down_proj, found .*\.0\."):
        compress(tmp_path / "stacked", finetune, tmp_path / "none")


OLD_BUFFERS = {
    "llama": ({}, "model.layers.{}.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    "gpt2": ({}, "transformer.h.{}.attn.bias", torch.ones(1, 1, 8, 8)),
    "gpt_neox": ({}, "gpt_neox.layers.{}.attention.masked_bias", torch.tensor(-1e9)),
}


@pytest.mark.parametrize("side", ["base", "finetune"])
@pytest.mark.parametrize("family", OLD_BUFFERS)
def test_buffers_of_older_versions_are_left_out(family: str, side: str, tmp_path: Path) -> None:
    _, name, value = OLD_BUFFERS[family]
    base, finetune = (save_random(tmp_path / x, config_of(family), s) for s, x in enumerate(("base", "finetune")))
    buffers = {name.format(layer): value.clone() for layer in range(2)}
    write_tensors(tmp_path / side / WEIGHTS, load_file(tmp_path / side / WEIGHTS) | buffers)
    assert near(loaded(restored(base, finetune)), loaded(finetune))
    assert not buffers.keys() & Delta.open(tmp_path / "delta").sites.keys()
    Delta.open(tmp_path / "delta").verify(base)


@pytest.mark.parametrize("in_base", [False, True])
def test_a_tied_head_that_a_file_repeats_is_no_site_of_its_own(in_base: bool, tmp_path: Path) -> None:
    config = config_of("llama", tie_word_embeddings=True)
    base, finetune = (save_random(tmp_path / name, config, seed) for seed, name in enumerate(("base", "finetune")))
    for folder in (base, finetune) if in_base else (finetune,):
        tensors = load_file(folder / WEIGHTS)
        write_tensors(folder / WEIGHTS, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert near(loaded(restored(base, finetune)), loaded(finetune))
    assert "lm_head.weight" not in load_file(tmp_path / "restored" / WEIGHTS)
    assert "lm_head.weight" not in Delta.open(tmp_path / "delta").sites


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrapper_in_the_names_is_said(prefix: str, tmp_path: Path) -> None:
    base, finetune = (save_random(tmp_path / x, config_of("llama"), s) for s, x in enumerate(("base", "finetune")))
    rename(finetune, lambda name: prefix + name)
    with pytest.raises(ArchitectureError, match=f"names with '{prefix}' are those of"):
        compress(base, finetune, tmp_path / "delta")


# --- weights that were only cast ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_weights_that_were_only_cast_are_shared(ours: torch.dtype, theirs: torch.dtype, tmp_path: Path) -> None:
    base, finetune = save_random(tmp_path / "base", config_of("llama")), tmp_path / "finetune"
    shutil.copytree(base, finetune)
    tensors = {name: tensor.to(ours) for name, tensor in load_file(base / WEIGHTS).items()}
    write_tensors(base / WEIGHTS, tensors)
    cast = {name: tensor.to(theirs) for name, tensor in tensors.items()}
    cast[NAME] = cast[NAME] + 0.1 * torch.randn(48, 32).to(theirs)
    write_tensors(finetune / WEIGHTS, cast)
    back = load_file(restored(base, finetune) / WEIGHTS)
    delta = Delta.open(tmp_path / "delta")
    assert {name for name, site in delta.sites.items() if site.kind != "shared"} == {NAME}
    assert all(site.dtype == theirs for site in delta.sites.values())
    assert all(torch.equal(back[name], tensor) for name, tensor in cast.items() if name != NAME)
    assert not torch.equal(back[NAME], tensors[NAME].to(theirs))


# --- files that are carried ----------------------------------------------------------------------------------------


def test_files_of_tokenizer_processor_and_code_come_back(tmp_path: Path) -> None:
    base, finetune = (save_random(tmp_path / x, config_of("llama"), s) for s, x in enumerate(("base", "finetune")))
    tokenizer = AutoTokenizer.from_pretrained(finetune)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(finetune)
    names = ["tekken.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
    names += ["qwen.tiktoken", "tokenization_own.py", "modeling_own.py"]
    for name in names:
        (finetune / name).write_text(f'{{"{name}": 1}}')
    back = restored(base, finetune)
    assert all((back / name).read_text() == (finetune / name).read_text() for name in names)
    assert AutoTokenizer.from_pretrained(back).chat_template == tokenizer.chat_template
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    import_adapter(finetune, adapter, tmp_path / "expert")
    assert AutoTokenizer.from_pretrained(tmp_path / "expert").chat_template == tokenizer.chat_template
    assert all((tmp_path / "expert" / name).is_file() for name in names)


def test_a_models_own_code_is_carried_and_never_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, finetune = (save_random(tmp_path / x, config_of("llama"), s) for s, x in enumerate(("base", "finetune")))
    code = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    for folder in (base, finetune):
        config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
        config["auto_map"] = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
        (folder / "config.json").write_text(json.dumps(config))
        for name in ("configuration_own.py", "modeling_own.py"):
            (folder / name).write_text(code)
    back = restored(base, finetune)
    assert (back / "modeling_own.py").read_text() == code and (back / "configuration_own.py").is_file()
    with pytest.raises(UnsupportedModelError, match="the code that comes with a checkpoint is never run"):
        load_model(Checkpoint(base))
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in capfd.readouterr().out
