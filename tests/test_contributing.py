"""CONTRIBUTING.md and the pages of docs/ name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
GUIDE = (HOUSE / "CONTRIBUTING.md").read_text(encoding="utf-8")
QUESTIONS = re.findall(r"^\| (Where [^|]*\?) \| (.*) \|$", GUIDE, re.MULTILINE)
PAGES = [HOUSE / "README.md", HOUSE / "CONTRIBUTING.md", *sorted((HOUSE / "docs").glob("*.md"))]


def test_there_are_questions() -> None:
    assert len(QUESTIONS) >= 10


@pytest.mark.parametrize(("question", "answer"), QUESTIONS)
def test_answers_name_files(question: str, answer: str) -> None:
    files = re.findall(r"`([^`]+)`", answer)
    assert files
    assert [file for file in files if not (HOUSE / file).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
