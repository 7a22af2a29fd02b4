"""The house itself: docstrings hold what they show, and what a newcomer runs first is there."""

from __future__ import annotations

import ast
import doctest
import hashlib
import importlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
SOURCES = sorted((HOUSE / "python").rglob("*.py"))
MODULES = [".".join(path.relative_to(HOUSE / "python").with_suffix("").parts) for path in SOURCES]
VERBS = (
    "demo",
    "test",
    "test-models",
    "interleavings",
    "miri",
    "cuda-check",
    "lint",
    "lint-aarch64",
    "bench",
    "docs",
    "wheel",
    "wheel-check",
    "gpu-wheel",
    "gpu-check",
    "clean",
)


@pytest.mark.parametrize("name", [name.removesuffix(".__init__") for name in MODULES])
def test_docstrings_hold(name: str, example_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(example_folder)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("path", SOURCES, ids=MODULES)
def test_files_open_with_prose(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "a file opens with what it is for"
    assert "from __future__ import annotations" in source or not re.search(r"^(def|class) ", source, re.MULTILINE)


def test_license_is_the_unmodified_apache_license() -> None:
    digest = hashlib.sha256((HOUSE / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lists_its_verbs() -> None:
    said = subprocess.run(["make", "help"], cwd=HOUSE, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in said.splitlines()} >= set(VERBS)


def test_ci_runs_the_verbs() -> None:
    script = HOUSE / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert all(f"make {verb}\n" in script.read_text(encoding="utf-8") for verb in ("lint", "test"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("verb", "commands"),
    [
        (
            "lint",
            ("cargo fmt", "cargo clippy", "--no-default-features", "cargo doc", "msrv.py", "ruff", "mypy", "stubtest"),
        ),
        ("test", ("cargo test", "-p meswitch-cuda", "overflow-checks=true", "debug-assertions=true", "pytest")),
        ("test-models", ("pytest -m slow",)),
        ("interleavings", ("--cfg shuttle", "--target-dir target/shuttle")),
        ("cuda-check", ("sanitizers.py", "mutations.py")),
        ("docs", ("mkdocs build --strict",)),
        ("wheel-check", ("maturin sdist", "maturin build", "wheel.py")),
        ("gpu-wheel", ("maturin build", "gpu_wheels.py dist/*.whl dist/gpu")),
        ("gpu-check", ("gpu_check.py",)),
    ],
)
def test_verbs_run_every_check(verb: str, commands: tuple[str, ...]) -> None:
    planned = subprocess.run(["make", "--dry-run", verb], cwd=HOUSE, capture_output=True, text=True, check=True).stdout
    assert [command for command in commands if command not in planned] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.skipif(
    bool(shutil.which("nvcc")) or Path("/usr/local/cuda/bin/nvcc").exists(), reason="has a system's nvcc"
)
@pytest.mark.parametrize(("wanted", "installed"), [("auto", True), ("off", False)])
def test_a_compiler_of_cuda_is_installed_unless_it_is_not_wanted(tmp_path: Path, wanted: str, installed: bool) -> None:
    command = ["make", "--dry-run", "venv", f"VENV={tmp_path / 'venv'}", f"MESWITCH_CUDA={wanted}", "CUDA_HOME="]
    planned = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=True).stdout
    assert ("--group cuda" in planned) == installed
