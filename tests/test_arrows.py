"""Imports point down: nothing knows what stands above it or beside it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
PACKAGE = HOUSE / "python" / "meswitch"

# A room may import from the floors below its own.
FLOORS = (
    ("cli", "serve"),
    ("demo",),
    ("engine", "distill", "adapter"),
    ("scheduling", "experts", "router", "moe", "compress"),
    ("layers", "attention", "evaluate", "sensitivity", "hessians"),
    ("ops", "calibration", "allocation", "low_rank"),
    ("delta", "decoder"),
    ("reference", "checkpoint", "config"),
    ("errors", "_native"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
CRATES = ("meswitch-python", "meswitch-cuda", "meswitch-core")
NAMELESS = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from run_time_nodes(node)


def imported_rooms(source: str) -> set[str]:
    """The rooms a file imports from.

    >>> sorted(imported_rooms("import meswitch.ops\\nfrom meswitch import delta, __version__\\nfrom torch import nn"))
    ['delta', 'ops']
    """
    names = []
    for node in run_time_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names if name.startswith("meswitch.")]
    return {part[1] for part in parts if part[1] in FLOOR or (PACKAGE / part[1]).with_suffix(".py").exists()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    assert own in FLOOR, f"{own} stands on no floor: give it one in FLOORS"
    wrong = {
        other
        for other in imported_rooms(path.read_text(encoding="utf-8"))
        if other != own and FLOOR.get(other, -1) <= FLOOR[own]
    }
    assert not wrong, f"{own} imports {', '.join(sorted(wrong))}, which does not stand below it"


def test_type_only_imports_are_no_arrows() -> None:
    assert imported_rooms("if TYPE_CHECKING:\n    from meswitch.engine import Engine") == set()
    assert imported_rooms("def f():\n    from meswitch.engine import Engine") == {"engine"}


@pytest.mark.parametrize("crate", [crate for crate in CRATES if (HOUSE / "rust" / crate).exists()])
def test_crates_point_down(crate: str) -> None:
    manifest = (HOUSE / "rust" / crate / "Cargo.toml").read_text(encoding="utf-8")
    used = set(re.findall(r"^(meswitch-\w+|pyo3)\b", manifest, flags=re.MULTILINE))
    below = set(CRATES[CRATES.index(crate) + 1 :])
    assert used <= below | ({"pyo3"} if crate == "meswitch-python" else set())


@pytest.mark.parametrize("folder", ["python", "rust", "tests", "benches", "cuda"])
def test_every_file_is_a_noun(folder: str) -> None:
    found = [path for path in (HOUSE / folder).rglob("*") if path.stem.lower() in NAMELESS]
    assert not found, "a file says what is in it"
