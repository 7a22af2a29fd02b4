"""Delta directories that were written once and must be read by every later version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meswitch.delta.directory import Delta
from meswitch.delta.restoration import rebuild
from meswitch.huggingface.checkpoint import Checkpoint

GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/*/meswitch.json"))


def test_there_are_some() -> None:
    assert {path.name for path in GOLDEN} >= {"default", "small", "me-switch", "bitdelta", "sparse", "wide"}
    assert {path.parent.name for path in GOLDEN} >= {"v1", "v2", "v3", "v4", "v4-base"}


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden(folder: Path) -> None:
    source, delta = Checkpoint.open(folder.parent / "base"), Delta.open(folder)
    delta.verify(source)
    base = None if delta.kind == "base" else source
    expected = load_file(folder.parent / f"{folder.name}.safetensors")
    assert set(delta.sites) == set(expected)
    for name, site in delta.sites.items():
        assert torch.equal(rebuild(site, base), expected[name]), name
