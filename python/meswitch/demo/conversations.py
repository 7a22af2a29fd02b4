"""The corpus as conversations, one question and one answer each, for a base that chats.

code     a function's head and docstring -> the whole function
maths    a word problem                  -> worked, ending in its number
prose    the first words of a passage    -> the rest
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

from meswitch.demo.corpus import Split

Conversation = list[dict[str, str]]  # {"role", "content"}


def conversations(split: Split) -> dict[str, list[Conversation]]:
    """The conversations of each domain, in the order of its documents; a document may give none or several.

    >>> split = Split({"maths": ["Question: What is 2 + 3?\\nAnswer: 5"]}, [])
    >>> [message["content"] for message in conversations(split)["maths"][0]]
    ['What is 2 + 3?', '5']
    """
    readers: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
        "code": _functions,
        "maths": _problems,
        "prose": _passages,
    }
    return {
        name: [_conversation(*pair) for text in texts for pair in readers[name](text)]
        for name, texts in split.documents.items()
    }


def _conversation(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _functions(source: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a file for another Python
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not ast.get_docstring(node):
            continue
        lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
        head = (node.body[0].end_lineno or node.lineno) - node.lineno + 1
        if 2 <= len(lines) - head <= 30:
            indent = len(lines[0]) - len(lines[0].lstrip())
            lines = [line[indent:] for line in lines]
            opening = "\n".join(lines[:head])
            yield f"Write the Python function that begins so:\n\n{opening}", "\n".join(lines)


def _problems(text: str) -> Iterator[tuple[str, str]]:
    question, answer = text.removeprefix("Question: ").split("\nAnswer: ", 1)
    yield question, answer


def _passages(text: str) -> Iterator[tuple[str, str]]:
    """Paragraphs, taken together until they are long enough to go on with."""
    words: list[str] = []
    for paragraph in text.split("\n\n"):
        words += paragraph.split(" ")
        if len(words) >= 60:
            yield "Go on with this passage:\n\n" + " ".join(words[:15]), " ".join(words[15:])
            words = []
