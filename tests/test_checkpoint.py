"""One folder, one reading: what a checkpoint holds is what transformers loads of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import config_of, save_random
from meswitch import compress
from meswitch.errors import CheckpointError
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


def test_adapter_files_beside_a_model_are_not_loaded(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("llama"))
    adapter = save_adapter(folder, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    model = load_model(Checkpoint(folder))
    assert set(model.state_dict()) == set(load_file(folder / WEIGHTS))
    assert same(Checkpoint(folder), model.state_dict())


def test_an_adapter_alone_is_for_import(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    adapter = save_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="meswitch import"):
        compress(base, adapter, tmp_path / "delta")
