"""A delta directory seen from Python: what opens, what is refused, what is read."""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from families import config_of, save_finetune, save_random
from meswitch import reference
from meswitch.compression.job import compress
from meswitch.delta.directory import Delta
from meswitch.errors import BaseMismatchError, ChecksumError, FormatError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.site import QuantizedSite

UP = "model.layers.0.mlp.up_proj.weight"


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


def test_tensors_outlive_the_delta(made: Path) -> None:
    delta = Delta.open(made / "delta")
    site = delta.sites[UP]
    assert site.parts[0].codes.data_ptr() % 64 == 0
    codes = site.parts[0].codes.clone()
    delta.close()
    assert torch.equal(site.parts[0].codes, codes)
    with pytest.raises(ValueError, match="a closed one"):
        delta.load()


def test_sites_one_by_one_all_together_and_in_outline_are_the_same(made: Path) -> None:
    delta = Delta.open(made / "delta")
    all_sites, outline = delta.load(), delta.outline
    assert list(delta.sites) == list(all_sites) == list(outline) and len(delta.sites) == len(all_sites)
    for name, site in delta.sites.items():
        assert (site.kind, site.shape, site.dtype, site.nbytes) == (
            outline[name].kind,
            outline[name].shape,
            outline[name].dtype,
            all_sites[name].nbytes,
        )
        if isinstance(site, QuantizedSite):
            drawn = outline[name].parts[0]
            assert drawn.codes.is_meta and drawn.scales.shape == site.parts[0].scales.shape
            assert torch.equal(site.parts[0].codes, all_sites[name].parts[0].codes)
    with pytest.raises(KeyError):
        delta.sites["other"]
    # In memory each tensor starts at a multiple of 64 bytes, as in the file, whose header and manifest come on top.
    size = (made / "delta/delta.safetensors").stat().st_size
    assert 0 < delta.memory_bytes - sum(site.nbytes for site in outline.values()) < 64 * 3 * len(outline) + 2 * 4096
    assert delta.memory_bytes < size + 4096


def test_memory_is_given_back_with_the_last_tensor(made: Path) -> None:
    def mapped() -> int:
        pages = Path("/proc/self/statm").read_text().split()[0]
        return int(pages) * resource.getpagesize()

    delta = Delta.open(made / "delta")
    before = mapped()
    kept = [delta.load()[UP] for _ in range(64)]
    assert mapped() - before >= 64 * (delta.memory_bytes - (1 << 16))
    kept.clear()
    assert mapped() - before < 32 * delta.memory_bytes


def test_a_file_changed_in_place_is_an_error_and_a_replaced_one_is_not(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    shutil.copytree(made / "delta", folder)
    file, delta = folder / "delta.safetensors", Delta.open(folder)
    codes = delta.sites[UP].parts[0].codes
    sound = file.read_bytes()
    file.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ChecksumError, match="expected at least"):
        delta.load()
    file.write_bytes(bytes(len(sound)))
    with pytest.raises(ChecksumError, match="expected checksum"):
        delta.load()
    assert torch.equal(codes, Delta.open(made / "delta").sites[UP].parts[0].codes)
    file.write_bytes(sound)
    file.rename(tmp_path / "gone")
    file.write_bytes(bytes(len(sound)))
    assert torch.equal(delta.load()[UP].parts[0].codes, codes)


def test_many_deltas_may_be_open(made: Path) -> None:
    command = f"""
import resource
from meswitch.delta.directory import Delta
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
deltas = [Delta.open({str(made / "delta")!r}) for _ in range(200)]
assert all(delta.sites for delta in deltas)
"""
    subprocess.run([sys.executable, "-c", command], check=True)


def test_an_upgrade_changes_the_version_and_nothing_else(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "golden"
    for old in (golden / "v1/small", golden / "v2/sparse", golden / "v3/default"):
        folder = tmp_path / old.parent.name
        shutil.copytree(old, folder)
        before, delta = Delta.open(old), Delta.open(folder)
        assert delta.upgrade()
        upgraded = Delta.open(folder)
        upgraded.verify(old.parent / "base")
        assert not upgraded.upgrade()
        assert (
            upgraded.format_version > before.format_version
            and upgraded.manifest["settings"] == before.manifest["settings"]
        )
        for name, site in before.load().items():
            base = Checkpoint.open(old.parent / "base").tensor(name)
            assert torch.equal(reference.served(site, base), reference.served(upgraded.sites[name], base)), name


def test_a_damaged_directory_is_not_upgraded(tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    shutil.copytree(Path(__file__).parent / "golden/v3/default", folder)
    file = folder / "delta.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ChecksumError):
        Delta.open(folder).upgrade()
    assert file.read_bytes() == damaged and not list(tmp_path.glob(".*.incomplete"))


def test_an_open_delta_outlives_its_directory(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "delta", tmp_path / "delta")
    delta = Delta.open(tmp_path / "delta")
    shutil.rmtree(tmp_path / "delta")
    assert reference.dense(delta.sites[UP]).isfinite().all()


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
    damaged = bytearray((folder / "delta.safetensors").read_bytes())
    whole = Delta.open(folder).sites["lm_head.weight"].value.view(torch.uint8).numpy().tobytes()
    damaged[damaged.index(whole)] ^= 1
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
