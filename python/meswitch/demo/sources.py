"""Text that comes with Python and its packages: source files, prose, headers and stubs."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from inspect import cleandoc
from pathlib import Path

from meswitch.errors import DataError

SHORTEST, LONGEST = 1_000, 40_000  # characters of a source file that is read
_LEAST_CODE = 500_000  # characters in all
_SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3", "_bundled")
}


def source_files() -> list[tuple[str, str]]:
    """(name, text) of the standard library's source files. Raises `DataError` where Python came without them."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(name.parts) and SHORTEST <= path.stat().st_size <= LONGEST:
            files.append((name.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    if sum(len(text) for _, text in files) < _LEAST_CODE:
        raise DataError(
            f"expected the standard library's source files, found {len(files)} of them: {root}",
            hint="run under a Python that is installed with its .py files",
        )
    return files


def header_files() -> list[tuple[str, Path]]:
    """(name, path) of the C headers and type stubs of Python, torch and numpy, short and long ones too."""
    roots = [Path(sysconfig.get_path("include"))]
    for package in ("torch", "numpy"):
        spec = importlib.util.find_spec(package)
        roots += [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    return list({path.relative_to(root).as_posix(): path for root in roots for path in root.rglob("*.[hp]*")}.items())


def read_headers(paths: list[Path]) -> Iterator[str]:
    """The text of those of the files that are of a length worth reading, one at a time."""
    for path in paths:
        if path.suffix in (".h", ".hpp", ".pyi") and SHORTEST <= path.stat().st_size <= LONGEST:
            yield path.read_text(encoding="utf-8", errors="replace")


def prose_documents() -> list[tuple[str, str]]:
    """(key, text) of language reference, docstrings, licences and descriptions of packages.

    A paragraph stands in the first document that has it. A source file's docstrings carry that file's name as key.
    """
    known: set[str] = set()
    documents = []
    for key, text in _raw_prose():
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if _reads_as_prose(words) and words.lower() not in known:
                known.add(words.lower())
                paragraphs.append(words)
        if paragraphs:
            documents.append((key, "\n\n".join(paragraphs)))
    return documents


def _reads_as_prose(words: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in words)
    return len(words) >= 80 and letters >= 0.88 * len(words) and words.isascii() and ">>>" not in words


def _raw_prose() -> Iterator[tuple[str, str]]:
    with suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        yield from ((f"topic {name}", text) for name, text in sorted(topics.items()))
    for name, source in source_files():
        yield name, "\n\n".join(_docstrings(source))
    for path in _package_texts():
        text = path.read_text(encoding="utf-8", errors="replace")
        yield f"package {path.parent.name}/{path.name}", text[:LONGEST]


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a file for another Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield cleandoc(text)


def _package_texts() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    licences = [path for path in (root / "LICENSE.txt", root.parent.parent / "LICENSE.txt") if path.is_file()]
    packages = Path(sysconfig.get_path("purelib"))
    names = ("METADATA", "LICEN[CS]E*", "COPYING*", "licenses/LICEN[CS]E*")
    return licences + sorted(p for name in names for p in packages.glob(f"*.dist-info/{name}") if p.is_file())
