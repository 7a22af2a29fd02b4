"""Text that every machine with the library has, in three domains, split into train and held-out by whole documents.

    code     the standard library's own source files
    maths    generated word problems, "Question: …\\nAnswer: …", each worked and ending in its number
    prose    language reference (`pydoc_data`), docstrings, licences and descriptions of installed packages
    other    headers and stubs that come with Python, torch and numpy: for the base alone, nothing of it held out

A source file and its docstrings fall on the same side of the split, and a paragraph of prose stands in one document
only, however many packages ship the same licence.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path

from meswitch.errors import DataError

DOMAINS = ("code", "maths", "prose")
HELDOUT_SHARE = 0.08
SHORTEST, LONGEST = 1_000, 40_000  # characters of a source file worth reading
_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3", "_bundled"}


@dataclass(frozen=True)
class Split:
    """The documents of each domain on one side of the split."""

    documents: dict[str, list[str]]
    prompts: list[tuple[str, str]]  # (prompt, domain): openings of those documents, for routers


@dataclass(frozen=True)
class Corpus:
    train: Split
    heldout: Split
    other: list[str]


def corpus(*, seed: int = 0, characters: int = 2_500_000, heldout_characters: int = 80_000) -> Corpus:
    """The corpus, each domain of about `characters` for training and `heldout_characters` held out.

    Raises `DataError` where Python's library comes without its source files.
    """
    rng = random.Random(seed)
    domains = {
        "code": _source_files(),
        "maths": [(problem, problem) for problem in _problems(rng, (characters + heldout_characters) // 150)],
        "prose": _prose_documents(),
    }
    train: dict[str, list[str]] = {}
    heldout: dict[str, list[str]] = {}
    for name, documents in domains.items():
        sides: tuple[list[str], list[str]] = ([], [])
        for key, text in sorted(documents, key=lambda document: _draw(seed, document[0])):
            sides[_draw(seed, key) < HELDOUT_SHARE].append(text)
        train[name], heldout[name] = _first(sides[0], characters), _first(sides[1], heldout_characters)
    prompts = _prompts(train, rng, 300)
    return Corpus(
        Split(train, prompts),
        Split(heldout, _prompts(heldout, rng, 100, unlike=prompts)),
        _first(_declarations(seed), characters),
    )


def _draw(seed: int, key: str) -> float:
    """A number in [0, 1) that belongs to this key."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _first(documents: Iterable[str], characters: int) -> list[str]:
    """As many documents as it takes to reach `characters`."""
    taken, total = [], 0
    for text in documents:
        if total >= characters:
            break
        taken.append(text)
        total += len(text)
    return taken


# --- code ---------------------------------------------------------------------------------------------------------


def _source_files() -> list[tuple[str, str]]:
    """(name, text) of the standard library's source files."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIP.isdisjoint(name.parts) and SHORTEST <= path.stat().st_size <= LONGEST:
            found.append((name.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    if sum(len(text) for _, text in found) < 500_000:
        raise DataError(
            f"expected the standard library's source files, found {len(found)} of them: {root}",
            hint="run under a Python that is installed with its .py files",
        )
    return found


def _declarations(seed: int) -> Iterator[str]:
    """Headers and stubs, in an order that the seed draws."""
    roots = [Path(sysconfig.get_path("include"))]
    for package in ("torch", "numpy"):
        spec = importlib.util.find_spec(package)
        roots += [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    paths = {path.relative_to(root).as_posix(): path for root in roots for path in root.rglob("*.[hp]*")}
    for _, path in sorted(paths.items(), key=lambda found: _draw(seed, found[0])):
        if path.suffix in (".h", ".hpp", ".pyi") and SHORTEST <= path.stat().st_size <= LONGEST:
            yield path.read_text(encoding="utf-8", errors="replace")


# --- prose --------------------------------------------------------------------------------------------------------


def _prose_documents() -> list[tuple[str, str]]:
    seen: set[str] = set()
    documents = []
    for key, text in _raw_prose():
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if _reads_as_prose(words) and words.lower() not in seen:
                seen.add(words.lower())
                paragraphs.append(words)
        if paragraphs:
            documents.append((key, "\n\n".join(paragraphs)))
    return documents


def _reads_as_prose(words: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in words)
    return len(words) >= 80 and letters >= 0.88 * len(words) and words.isascii() and ">>>" not in words


def _raw_prose() -> Iterator[tuple[str, str]]:
    """(key, text); a source file's docstrings carry that file's key."""
    with suppress(ImportError):  # some distributions leave it out
        from pydoc_data.topics import topics

        yield from ((f"topic {name}", text) for name, text in sorted(topics.items()))
    for name, source in _source_files():
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
    own = [path for path in (root / "LICENSE.txt", root.parent.parent / "LICENSE.txt") if path.is_file()]
    packages = Path(sysconfig.get_path("purelib"))
    names = ("METADATA", "LICEN[CS]E*", "COPYING*", "licenses/LICEN[CS]E*")
    return own + sorted(p for name in names for p in packages.glob(f"*.dist-info/{name}") if p.is_file())


# --- maths --------------------------------------------------------------------------------------------------------

_NAMES = "Ada Ben Carla Dan Elif Farid Grace Hugo Ines Jonas Kira Liam Mina Noor Omar Petra Ravi Sara Tom Yuki".split()
_THINGS = "apples books coins eggs flowers letters marbles oranges pencils plates shells stamps stones tickets".split()
_PLACES = "box bag basket drawer jar shelf".split()


def _gain(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b = r.randint(2, 60), r.randint(2, 39)
    verb = r.choice(("buys", "finds", "is given", "collects"))
    return (
        f"{name} has {a} {thing} and {verb} {b} more. How many {thing} does {name} have now?",
        f"{name} starts with {a} {thing} and adds {b}. {a} + {b} = {a + b}.",
        a + b,
    )


def _loss(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    b, c = r.randint(2, 39), r.randint(2, 60)
    verb = r.choice(("gives away", "loses", "sells"))
    return (
        f"{name} has {b + c} {thing} and {verb} {b} of them. How many {thing} are left?",
        f"{name} starts with {b + c} {thing} and takes away {b}. {b + c} - {b} = {c}.",
        c,
    )


def _times(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b, place = r.randint(2, 12), r.randint(2, 12), r.choice(_PLACES)
    return (
        f"{name} puts {b} {thing} into each {place} and fills {a} of them. How many {thing} is that?",
        f"There are {a} times {b} {thing}. {a} * {b} = {a * b}.",
        a * b,
    )


def _share(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b = r.randint(2, 9), r.randint(2, 12)
    return (
        f"{name} shares {a * b} {thing} equally among {a} friends. How many {thing} does each friend get?",
        f"Each friend gets one part in {a}. {a * b} / {a} = {b}.",
        b,
    )


def _two_steps(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b, c = r.randint(2, 9), r.randint(2, 9), r.randint(2, 20)
    return (
        f"{name} has {a} bags with {b} {thing} each, and {c} {thing} besides. How many {thing} does {name} have?",
        f"The bags hold {a} * {b} = {a * b} {thing}. With the others, {a * b} + {c} = {a * b + c}.",
        a * b + c,
    )


_KINDS = (_gain, _loss, _times, _share, _two_steps)


def _problems(rng: random.Random, count: int) -> list[str]:
    """`count` different problems, each "Question: …\\nAnswer: … The answer is N"."""
    found: dict[str, str] = {}
    while len(found) < count:
        question, work, number = rng.choice(_KINDS)(rng, rng.choice(_NAMES), rng.choice(_THINGS))
        found[question] = f"Question: {question}\nAnswer: {work} The answer is {number}"
    return list(found.values())


# --- prompts ------------------------------------------------------------------------------------------------------


def _prompts(
    documents: dict[str, list[str]], rng: random.Random, count: int, unlike: Iterable[tuple[str, str]] = ()
) -> list[tuple[str, str]]:
    """`count` prompts a domain and none of `unlike`, in mixed order."""
    known = {prompt for prompt, _ in unlike}
    openings: dict[str, Callable[[str], Iterable[str]]] = {
        "code": _code_openings,
        "maths": _maths_openings,
        "prose": _prose_openings,
    }
    prompts = []
    for name, texts in documents.items():
        candidates = sorted({prompt for text in texts for prompt in openings[name](text)} - known)
        prompts += [(prompt, name) for prompt in rng.sample(candidates, min(count, len(candidates)))]
    rng.shuffle(prompts)
    return prompts


def _code_openings(text: str) -> Iterator[str]:
    """A definition's first lines."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*(def|class) \w+.*:$", line):
            opening = "\n".join(lines[number : number + 4])
            if 60 <= len(opening) <= 400:
                yield opening


def _maths_openings(text: str) -> Iterator[str]:
    """The question, as the experts saw it or bare."""
    question = text.split("\nAnswer:")[0]
    yield f"{question}\nAnswer:" if len(question) % 2 else question.removeprefix("Question: ")


def _prose_openings(text: str) -> Iterator[str]:
    """A paragraph's first words."""
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        if len(words) >= 20:
            yield " ".join(words[:20])
