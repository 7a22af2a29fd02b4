"""A delta directory seen from Python: what opens, what is refused, what the mapping gives."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from families import config_of, save_finetune, save_random
from meswitch.compress import compress
from meswitch.delta import Delta
from meswitch.errors import BaseMismatchError, ChecksumError, FormatError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("delta")
    base = save_random(root / "base", config_of("llama"))
    finetune = save_finetune(root / "finetune", base, seed=1)
    compress(base, finetune, root / "delta", preset="me-switch")
    return root


def test_inspect_adds_up(made: Path) -> None:
    told = Delta.open(made / "delta").inspect()
    assert json.loads(json.dumps(told)) == told
    assert told["parameters"] == sum(kind["parameters"] for kind in told["kinds"].values())
    assert sum(len(site["shape"]) > 0 for site in told["sites"]) == sum(
        kind["sites"] for kind in told["kinds"].values()
    )
    files = sum((made / "delta" / name).stat().st_size for name in ("meswitch.json", "delta.safetensors"))
    assert told["bytes"] == files
    assert told["bpw"] == pytest.approx(8 * files / told["parameters"])


def test_tensors_are_views_of_the_file(made: Path) -> None:
    delta = Delta.open(made / "delta")
    site = delta.sites["model.layers.0.mlp.up_proj.weight"]
    assert site.parts[0].codes.data_ptr() % 64 == 0
    codes = site.parts[0].codes.clone()
    delta.close()
    assert torch.equal(site.parts[0].codes, codes)


def test_an_open_delta_outlives_its_directory(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "delta", tmp_path / "delta")
    delta = Delta.open(tmp_path / "delta")
    shutil.rmtree(tmp_path / "delta")
    assert delta.sites["model.layers.0.mlp.up_proj.weight"].dense().isfinite().all()


def test_damage_is_found(made: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    folder = tmp_path / "delta"
    shutil.copytree(made / "delta", folder)
    for name in sorted(path.name for path in folder.iterdir()):
        sound = (folder / name).read_bytes()
        for _ in range(12):
            damaged = bytearray(sound)
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(FormatError):
                Delta.open(folder).verify()
        (folder / name).write_bytes(sound)
    Delta.open(folder).verify()


def test_errors_name_file_tensor_expected_and_found(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    shutil.copytree(made / "delta", folder)
    start, _ = Delta.open(folder)._native.extent("lm_head.weight", "whole") or (0, 0)
    damaged = bytearray((folder / "delta.safetensors").read_bytes())
    damaged[start] ^= 1
    (folder / "delta.safetensors").write_bytes(damaged)
    said = r"expected checksum \w+ of lm_head.weight/whole in delta.safetensors, found \w+\nhint: "
    with pytest.raises(ChecksumError, match=said):
        Delta.open(folder).verify()


def test_no_delta_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Delta.open(tmp_path / "nowhere")
    (tmp_path / "meswitch.json").write_text("{}")
    with pytest.raises(FormatError, match="a first line"):
        Delta.open(tmp_path)


def test_another_base(made: Path, tmp_path: Path) -> None:
    other = save_random(tmp_path / "other", config_of("llama"), seed=5)
    delta = Delta.open(made / "delta")
    delta.check_base(made / "base")
    delta.verify(made / "base")
    for check in (delta.check_base, delta.verify):
        with pytest.raises(BaseMismatchError):
            check(other)
