"""Text that every machine with the library has, in three domains, split into train and held-out by whole documents.

    code     the standard library's own source files
    maths    generated word problems, "Question: …\\nAnswer: …", each worked and ending in its number
    prose    language reference (`pydoc_data`), docstrings, licences and descriptions of installed packages
    other    headers and stubs that come with Python, torch and numpy: for the base alone, nothing of it held out

A source file and its docstrings fall on the same side of the split, and a paragraph of prose stands in one document
only, however many packages ship the same licence.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass

from meswitch.demo.openings import draw_prompts
from meswitch.demo.problems import problems
from meswitch.demo.sources import header_files, prose_documents, read_headers, source_files
from meswitch.progress import ProgressCallback, ProgressMeter

DOMAINS = ("code", "maths", "prose")
HELDOUT_SHARE = 0.08
_CHARACTERS_A_PROBLEM = 150  # about
_TRAIN_PROMPTS, _HELDOUT_PROMPTS = 300, 100  # a domain


@dataclass(frozen=True)
class Split:
    """The documents of each domain on one side of the split."""

    documents: dict[str, list[str]]
    prompts: list[tuple[str, str]]  # (prompt, domain): openings of those documents, for routers


@dataclass(frozen=True)
class Corpus:
    """Both sides of the split, and `other` documents that belong to no domain."""

    train: Split
    heldout: Split
    other: list[str]


def corpus(
    *,
    seed: int = 0,
    characters: int = 2_500_000,
    heldout_characters: int = 80_000,
    progress: ProgressCallback | None = None,
) -> Corpus:
    """The corpus, each domain of about `characters` for training and `heldout_characters` held out.

    `progress` counts domains, then prompts and other text. Raises `DataError` where Python's library comes without its
    source files.
    """
    rng = random.Random(seed)
    readers = {
        "code": source_files,
        "maths": lambda: _keyed_problems(rng, (characters + heldout_characters) // _CHARACTERS_A_PROBLEM),
        "prose": prose_documents,
    }
    meter = ProgressMeter(progress, "reading the corpus", len(readers) + 2)
    train: dict[str, list[str]] = {}
    heldout: dict[str, list[str]] = {}
    for name, read in readers.items():
        meter.advance(0, name)
        sides: tuple[list[str], list[str]] = ([], [])
        for key, text in sorted(read(), key=lambda document: _number(seed, document[0])):
            sides[_number(seed, key) < HELDOUT_SHARE].append(text)
        train[name], heldout[name] = _first(sides[0], characters), _first(sides[1], heldout_characters)
        meter.advance(1)
    prompts = draw_prompts(train, rng, _TRAIN_PROMPTS)
    heldout_prompts = draw_prompts(heldout, rng, _HELDOUT_PROMPTS, unlike=prompts)
    meter.advance(1)
    headers = sorted(header_files(), key=lambda header: _number(seed, header[0]))
    other = _first(read_headers([path for _, path in headers]), characters)
    meter.advance(1)
    return Corpus(Split(train, prompts), Split(heldout, heldout_prompts), other)


def _keyed_problems(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return [(problem, problem) for problem in problems(rng, count)]


def _number(seed: int, key: str) -> float:
    """A number in [0, 1) that belongs to this key: it decides the order and the side of the split."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _first(documents: Iterable[str], characters: int) -> list[str]:
    """As many documents as it takes to reach `characters`."""
    chosen: list[str] = []
    total = 0
    for text in documents:
        if total >= characters:
            break
        chosen.append(text)
        total += len(text)
    return chosen
