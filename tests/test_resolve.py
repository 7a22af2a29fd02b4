"""What stands for a checkpoint: a folder, or a hub id, which no path is taken for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from meswitch.errors import CheckpointError
from meswitch.huggingface.checkpoint import resolve


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids that the hub is asked for, in a folder that has `models/` and two files."""
    ids: list[str] = []

    def snapshot_download(source: str, **_: Any) -> str:
        ids.append(source)
        if source.startswith("no"):
            raise OSError("cannot reach the hub")
        return str(tmp_path / "models")

    (tmp_path / "models").mkdir()
    for file in ("file.safetensors", "file.gguf"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return ids


@pytest.mark.parametrize(
    ("source", "says", "hint"),
    [
        ("", "found empty text", None),
        ("nope", "found nothing: {here}/nope", "looks like organisation/model"),
        ("./x", "found nothing: {here}/x", "organisation/model"),
        ("../x/y", "found nothing: ", "organisation/model"),
        ("models/x", "found nothing: {here}/models/x", "with models here, models/x is not taken for a hub id"),
        ("org/model/", "found nothing: ", "organisation/model"),
        ("org/mo--del", "found nothing: ", "organisation/model"),
        ("org/a..b", "found nothing: ", "organisation/model"),
        ("org/.hidden", "found nothing: ", "organisation/model"),
        ("a b/c", "found nothing: ", "organisation/model"),
        ("~nobody-of-this-name/x", "found nothing: ", "organisation/model"),
        ("file.safetensors", "found a file: {here}/file.safetensors", "the folder that it lies in"),
        ("file.gguf", "found a GGUF file: {here}/file.gguf", 'from_pretrained(".", gguf_file="file.gguf"'),
        ("file.safetensors/x", "found nothing: ", "with file.safetensors here"),
        (Path("org/model"), "found nothing: {here}/org/model", "organisation/model"),
    ],
    ids=str,
)
def test_a_path_is_no_hub_id(asked: list[str], source: str | Path, says: str, hint: str | None) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(source)
    assert asked == [] and says.format(here=Path.cwd()) in caught.value.message
    assert hint == caught.value.hint or (hint and caught.value.hint and hint in caught.value.hint)


def test_a_hub_id_is_asked_for(asked: list[str], tmp_path: Path) -> None:
    assert resolve("org/model-1.5_b") == tmp_path / "models" and asked == ["org/model-1.5_b"]
    assert resolve("models") == Path("models") and len(asked) == 1
    with pytest.raises(CheckpointError, match=f"no {tmp_path}/nobody/model; cannot reach the hub"):
        resolve("nobody/model")


def test_a_hub_id_of_gguf_files_is_refused(asked: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="expected safetensors files on the hub, found none: org/Model-GGUF"
    ) as caught:
        resolve("org/Model-GGUF")
    assert caught.value.hint and 'from_pretrained("org/Model-GGUF", gguf_file="FILE.gguf"' in caught.value.hint
    (tmp_path / "models" / "model.safetensors").touch()
    assert resolve("org/Model-GGUF") == tmp_path / "models"
