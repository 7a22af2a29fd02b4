"""The README's example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meswitch.demo.paths import Family

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_example(
    block: str,
    family: Family,  # trained before the example asks for it
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert block.count("\n") <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.findall(r"^(\w+) ['\"]", printed, re.MULTILINE) == ["maths", "code", "base"]
    assert printed.count("bits a weight") == 3
