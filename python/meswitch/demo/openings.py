"""Prompts for routers: how the documents of each domain begin."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator


def draw_prompts(
    documents: dict[str, list[str]], rng: random.Random, count: int, unlike: Iterable[tuple[str, str]] = ()
) -> list[tuple[str, str]]:
    """`count` prompts of each domain's `documents`, as (prompt, domain), none of them in `unlike`, in mixed order."""
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
