"""A delta directory seen from Python: what opens, what is refused, what the mapping gives."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import config_of, save_finetune, save_random
from meswitch import _native, reference
from meswitch.compression.job import compress
from meswitch.delta.directory import Delta
from meswitch.errors import BaseMismatchError, ChecksumError, FormatError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("delta")
    base = save_random(root / "base", config_of("llama"))
    finetune = save_finetune(root / "finetune", base, seed=1)
    compress(base, finetune, root / "delta", "me-switch")
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


def old_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed rows as versions 1 and 2 of the format have them, in runs of 64 bytes: `uint8 [n, bytes]`."""
    if bits == 3:
        return torch.cat([old_rows(codes & 3, 2), old_rows(codes >> 2, 1)], dim=1)
    per_byte, columns = 8 // bits, codes.shape[1]
    whole, rest = divmod(columns, 64 * per_byte)
    last = 4 * -(-rest // (4 * per_byte))
    packed = torch.zeros(len(codes), 64 * whole + last, dtype=torch.uint8)
    for column in range(columns):
        run, at = divmod(column, 64 * per_byte)
        width = 64 if run < whole else last
        packed[:, 64 * run + at % width] |= codes[:, column] << (bits * (at // width))
    return packed


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(reference.BITS),
    rows=st.integers(0, 70) | st.integers(200, 600),
    columns=st.integers(1, 700),
    seed=st.integers(0, 2**31),
)
def test_codes_of_older_versions_are_put_in_order(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    old, expected = old_rows(codes, bits), reference.pack(codes, bits)
    found = torch.full_like(expected, -1)
    _native.tile(old, bits, columns, found)
    assert torch.equal(found, expected)


def test_codes_of_older_versions_fit_their_place() -> None:
    codes = torch.zeros(70, 300, dtype=torch.uint8)
    old, tiled = old_rows(codes, 2), reference.pack(codes, 2)
    for less, lacks in ((1, 0), (0, 4), (76 * 6, 0)):  # part of a row, a word, the rows of a cache line
        with pytest.raises(ValueError):
            _native.tile(old.flatten().view(torch.uint8)[: old.nbytes - less], 2, 300, tiled[: len(tiled) - lacks // 4])


def test_an_open_delta_outlives_its_directory(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "delta", tmp_path / "delta")
    delta = Delta.open(tmp_path / "delta")
    shutil.rmtree(tmp_path / "delta")
    assert reference.dense(delta.sites["model.layers.0.mlp.up_proj.weight"]).isfinite().all()


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
