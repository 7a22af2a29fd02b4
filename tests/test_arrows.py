"""Imports point down, file by file and without a circle, and the diagram in docs/architecture.md shows them.

`python tests/test_arrows.py` writes the diagram anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
PACKAGE = HOUSE / "python" / "meswitch"
ARCHITECTURE = HOUSE / "docs" / "architecture.md"
BEGIN, END = "<!-- arrows: written by tests/test_arrows.py -->\n", "<!-- end of arrows -->"

# A package, or a module at the top, may import from the floors below its own and from itself.
FLOORS = (
    ("cli", "server"),
    ("demo",),
    ("engine", "compression"),
    ("moe",),
    ("experts", "batching", "router"),
    ("layers",),
    ("kernels",),
    ("delta", "terminal"),
    ("huggingface",),
    ("reference",),
    ("site", "progress", "sizes", "expert_name", "target"),
    ("errors", "_native"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# What only some files may import: whole modules of others, and names of the native module.
ONLY = {
    "transformers.ContinuousBatchingConfig": ("batching/bridge.py",),
    "transformers.generation.continuous_batching": ("batching/bridge.py",),
    "meswitch._native.Matrix": ("kernels/",),
    "meswitch._native.Rows": ("kernels/",),
    "meswitch._native.Table": ("kernels/",),
    "meswitch._native.base_linear": ("kernels/",),
}
SERVING = ("engine", "batching", "experts", "layers")
OUTSIDE_OF_STEPS = ("batching/compatibility.py", "engine/prompt.py")  # the check at start, and what callers pass
CRATES = ("meswitch-python", "meswitch-cuda", "meswitch-core")
NAMELESS = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}
MOST_LINES = 460
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(file: str) -> str:
    """The package or top module that a file belongs to."""
    return file.split("/")[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """Every module and name that a file imports, type-checking imports included.

    >>> sorted(imported("import meswitch.site\\nif TYPE_CHECKING:\\n    from meswitch.delta import target"))
    ['meswitch.delta.target', 'meswitch.site']
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def target(name: str) -> str | None:
    """The file of the package that an imported name lies in; `_native` for the native module."""
    parts = name.split(".")
    if parts[0] != "meswitch" or len(parts) == 1:
        return None
    if parts[1] == "_native":
        return "_native"
    for end in range(len(parts), 1, -1):
        path = PACKAGE.joinpath(*parts[1:end])
        if path.with_suffix(".py").is_file():
            return relative(path.with_suffix(".py"))
        if (path / "__init__.py").is_file():
            return relative(path / "__init__.py")
    return None


@cache
def arrows() -> dict[str, set[str]]:
    """By file: the files that it imports from."""
    return {
        relative(path): {
            other for name in imported(path.read_text(encoding="utf-8")) if (other := target(name)) is not None
        }
        - {relative(path)}
        for path in FILES
    }


def diagram() -> str:
    """Every room with the rooms that its files import from, a floor a line or more."""
    below: dict[str, set[str]] = {}
    for file, others in arrows().items():
        below.setdefault(room(file), set()).update(room(other) for other in others)
    lines = ["```"]
    for rooms in FLOORS:
        for name in rooms:
            if name in below:
                own = sorted(below[name] - {name, "errors"}, key=lambda other: (FLOOR[other], other))
                lines.append(f"{name:<12} -> {', '.join(own)}" if own else name)
    return "\n".join([*lines, "```", ""])


def _between_markers(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    file = relative(path)
    own = room(file)
    assert own in FLOOR, f"{own} stands on no floor: give it one in FLOORS"
    wrong = {other for other in arrows()[file] if room(other) != own and FLOOR[room(other)] <= FLOOR[own]}
    assert not wrong, f"{file} imports {', '.join(sorted(wrong))}, which does not stand below it"


def test_no_file_imports_itself_by_way_of_others() -> None:
    # A package's own page may name what lies in it.
    graph = {
        file: {other for other in others if not other.endswith("__init__.py")} for file, others in arrows().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("forbidden", ONLY)
def test_what_only_some_files_may_import(forbidden: str) -> None:
    users = {
        relative(path)
        for path in FILES
        if any((name + ".").startswith(forbidden + ".") for name in _uses(path.read_text(encoding="utf-8")))
    }
    wrong = {file for file in users if not file.startswith(ONLY[forbidden])}
    assert not wrong, (
        f"only {' and '.join(ONLY[forbidden])} may import {forbidden}, but {', '.join(sorted(wrong))} does"
    )


def _uses(source: str) -> Iterator[str]:
    """Imported names, and the native module's names that are used through it."""
    yield from imported(source)
    yield from (f"meswitch._native.{name}" for name in re.findall(r"\b_native\.(\w+)", source))


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if room(relative(path)) in SERVING and relative(path) not in OUTSIDE_OF_STEPS],
    ids=relative,
)
def test_only_kernels_know_the_device(path: Path) -> None:
    """A step never waits for the device: no tensor is moved to the host, and nobody asks where one lies."""
    found = re.findall(r"\.is_cpu\b|\.is_cuda\b|\.tolist\(\)|\.item\(\)", path.read_text(encoding="utf-8"))
    assert not found, f"{relative(path)}: {found[0]}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_diagram_is_true() -> None:
    assert _between_markers(ARCHITECTURE.read_text(encoding="utf-8")) == diagram(), "python tests/test_arrows.py"


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


if __name__ == "__main__":
    text = ARCHITECTURE.read_text(encoding="utf-8")
    ARCHITECTURE.write_text(text.replace(BEGIN + _between_markers(text), BEGIN + diagram()), encoding="utf-8")
