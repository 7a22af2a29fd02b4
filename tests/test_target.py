"""Where folders may be written: one rule for all that write some, decided before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from families import config_of, save_finetune, save_random
from meswitch import Delta, compress, distill, import_adapter, quantize, restore, train_router
from meswitch.cli.guard import REFUSED, run
from meswitch.errors import OutputError
from meswitch.router.folder import MANIFEST, read_manifest, write_folder
from meswitch.target import new_folder, resolve_target

NOWHERE = "nowhere"
# With inputs that do not exist: only what is decided first can refuse the output.
WRITERS: dict[str, Callable[[Path], object]] = {
    "compress": lambda out: compress(NOWHERE, NOWHERE, out),
    "quantize": lambda out: quantize(NOWHERE, out),
    "import": lambda out: import_adapter(NOWHERE, NOWHERE, out),
    "restore": lambda out: restore(NOWHERE, NOWHERE, out),
    "distill": lambda out: distill(NOWHERE, NOWHERE, NOWHERE, out, NOWHERE),
    "router train": lambda out: train_router(NOWHERE, NOWHERE, out),
}
COMMANDS = (
    "compress nowhere nowhere --calibrate nowhere",
    "quantize nowhere --calibrate nowhere",
    "import nowhere nowhere",
    "restore nowhere nowhere",
    "router train nowhere --data nowhere",
)


def places(root: Path) -> dict[str, str]:
    """Places where nothing can be written, each with what its refusal says."""
    (root / "file").write_text("years of work")
    (root / "full").mkdir()
    (root / "full" / "thesis").write_text("years of work")
    (root / "dangling").symlink_to("nothing")
    (root / "full-link").symlink_to("full")
    (root / ".taken.incomplete").symlink_to("full")
    (root / ".locked.lock").mkdir()
    return {
        "file": "found something else",
        "full": "found something else",
        "full-link": "found something else",
        "dangling": "a link to nothing",
        "taken": "where the unfinished work is kept",
        "locked": "where the unfinished work is kept",
        ".": "by its name",
        "..": "by its name",
    }


def listing(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_an_output_is_refused_before_any_input_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[[Path], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    refusals = places(tmp_path)
    before = listing(tmp_path)
    for place, message in refusals.items():
        with pytest.raises(OutputError, match=message):
            writer(Path(place))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_its_output_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([*command.split(), "-o", "."]) == REFUSED
    assert "expected a folder to write to, by its name" in capsys.readouterr().err
    assert listing(tmp_path) == []


def test_folders_are_written_where_a_link_leads(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    for name in ("delta", "restored", "router"):
        (disk / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(f"{name}-chain")
        (tmp_path / f"{name}-chain").symlink_to(disk / name)
    base = save_random(tmp_path / "base", config_of("llama"))
    finetune = save_finetune(tmp_path / "finetune", base, seed=1)
    for preset in ("default", "small"):
        compress(base, finetune, tmp_path / "delta", preset)
        assert Delta.open(disk / "delta").manifest["settings"]["preset"] == preset
    restore(base, tmp_path / "delta", tmp_path / "restored")
    assert (disk / "restored" / "model.safetensors").is_file()
    write_folder(tmp_path / "router", {"kind": "drawn"}, {})
    assert read_manifest(disk / "router")["kind"] == "drawn"
    assert all((tmp_path / name).is_symlink() for name in ("delta", "restored", "router"))
    assert sorted(path.name for path in disk.iterdir()) == ["delta", "restored", "router"]


def test_two_writers_of_one_place_exclude_each_other(tmp_path: Path) -> None:
    with new_folder(tmp_path / "router", MANIFEST) as folder:
        (folder / MANIFEST).write_text("first")
        with pytest.raises(OutputError, match="another writer"):
            write_folder(tmp_path / "router", {}, {})
    assert (tmp_path / "router" / MANIFEST).read_text() == "first"
    with pytest.raises(KeyError), new_folder(tmp_path / "router", MANIFEST) as folder:
        (folder / MANIFEST).write_text("second")
        raise KeyError
    assert listing(tmp_path) == ["router", f"router/{MANIFEST}"]
    assert (tmp_path / "router" / MANIFEST).read_text() == "first"


def test_only_what_is_named_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "router").mkdir()
    (tmp_path / "router" / MANIFEST).write_text("{}")
    assert resolve_target(tmp_path / "router", replaces=MANIFEST) == tmp_path / "router"
    for replaces in (None, "meswitch.json"):
        with pytest.raises(OutputError, match="found something else"):
            resolve_target(tmp_path / "router", replaces=replaces)
