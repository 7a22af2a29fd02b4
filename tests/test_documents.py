"""Data files to documents: every form of line that data sets have is read, refused by line, or named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from families import CHAT_TEMPLATE, tokenizer_of
from meswitch.errors import DataError, DataWarning
from meswitch.huggingface.documents import read_texts

TEMPLATE = (
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<{{ c.function.name }}>{% endfor %}{% endfor %}"
)
ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of()


@pytest.fixture(scope="module")
def chatting() -> Any:
    tokenizer = tokenizer_of()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_reads_a_text_file_as_one_document(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_texts(tmp_path / "a.txt", tokenizer) == ["one\n\ntwo\n"]


def test_reads_every_form_of_line(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    path = lines(
        tmp_path / "a.jsonl",
        {"text": "plain\u2028still the same line"},
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "only this"},
        "",
        {"messages": [{"role": "user", "content": "hello"}]},
    )
    assert read_texts(path, tokenizer) == [
        "plain\u2028still the same line",
        "2+2=4",
        "only this",
        "<user>hello<assistant>",
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "JSON object"),
        ("[" * 100_000, "JSON object"),
        ("[1]", "JSON object"),
        ({"txt": "x"}, "'txt'"),
        ({}, "no key"),
        ({"text": 3}, "'text'"),
        ({"text": None}, "'text'"),
        ({"text": "\ud800"}, "surrogate"),
        ({"prompt": "a", "completion": 1}, "'completion'"),
        ({"completion": "a"}, "'completion'"),
        ({"messages": []}, "'messages'"),
        ({"messages": "hi"}, "'messages'"),
        ({"messages": [{"role": "user"}]}, "'content'"),
        ({"messages": [{"content": "x"}]}, "'role'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, line: Any, says: str) -> None:
    path = lines(tmp_path / "a.jsonl", {"text": "fine"}, "", line)
    with pytest.raises(DataError, match=says) as caught:
        read_texts(path, tokenizer)
    assert f"{path}:3" in str(caught.value)


def test_messages_need_a_template_that_takes_them(tmp_path: Path) -> None:
    plain = tokenizer_of()
    path = lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(DataError, match="chat template"):
        read_texts(path, plain)
    plain.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(DataError, match=r"no such role.*:1"):
        read_texts(path, plain)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_and_undecodable_files_are_refused(tmp_path: Path, tokenizer: Any, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_texts(tmp_path / name, tokenizer)


def test_other_files_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"\.txt or \.jsonl"):
        read_texts(tmp_path / "a.csv", tokenizer)
    for name in ("a.txt", "a.jsonl", "nope"):
        with pytest.raises(FileNotFoundError, match=name):
            read_texts(tmp_path / name, tokenizer)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"prompt": "1+1=", "response": "2"}, "1+1=2"),
        ({"prompt": "1+1=", "output": "2"}, "1+1=2"),
        ({"prompt": "1+1=", "completion": None}, "1+1="),
        ({"prompt": "1+1=", "completion": None, "response": "2"}, "1+1=2"),
        ({"messages": None, "text": "plain"}, "plain"),
        ({"prompt": [ASK], "completion": [ANSWER]}, "[user]q[assistant]a"),
        ({"prompt": [ASK], "tools": [TOOL]}, "(f)[user]q"),
        ({"messages": [ASK, ANSWER], "tools": json.dumps([TOOL])}, "(f)[user]q[assistant]a"),
        ({"messages": [ASK, ANSWER], "tools": ""}, "[user]q[assistant]a"),
        ({"messages": [{**ASK, "tool_calls": None, "name": None}]}, "[user]q"),
        (
            {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            "[user]q[assistant]<f>",
        ),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [CALL]}]}, "[user]q[assistant]<f>"),
        ({"conversations": [ASK, ANSWER]}, "[user]q[assistant]a"),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "[system]s[user]q[assistant]a",
        ),
        ({"instruction": "add", "input": "1 1", "output": "2"}, "[user]add\n\n1 1[assistant]2"),
        ({"instruction": "add", "input": "", "response": "2"}, "[user]add[assistant]2"),
        ({"prompt": "labelled", "expert": "math", "completion": "!"}, "labelled!"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lines_as_data_sets_have_them(tmp_path: Path, chatting: Any, line: Any, text: str) -> None:
    assert read_texts(lines(tmp_path / "a.jsonl", line), chatting) == [text]


def test_content_in_parts_is_what_the_template_writes(tmp_path: Path, chatting: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    path = lines(tmp_path / "a.jsonl", {"messages": messages})
    assert read_texts(path, chatting) == [chatting.apply_chat_template(messages, tokenize=False)]
    parts = tokenizer_of()
    parts.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    assert read_texts(path, parts) == ["q"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "'chosen', 'rejected'"),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK]}, "'chosen', 'rejected'"),
        ({"instruction": "q", "chosen": "a"}, "'chosen'"),
        ({"prompt": "q", "completion": "a", "response": "b"}, "'completion', 'response'"),
        ({"prompt": "q", "completion": ["a"]}, "'completion'"),
        ({"prompt": [ASK], "completion": "a"}, "'completion'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "'content', found null"),
        ({"messages": [{"role": "user", "content": []}]}, "'content'"),
        ({"messages": [{"role": "user", "content": ["q"]}]}, "'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "surrogate"),
        ({"messages": [ASK], "tools": "{"}, "template accepts"),
        ({"conversations": [{"from": "narrator", "value": "q"}]}, "'narrator'"),
        ({"conversations": [{"from": "human", "text": "q"}]}, "'value'"),
        ({"conversations": []}, "'conversations'"),
        ({"instruction": 3}, "'instruction'"),
        ({"question": "q", "answer": "a", "text": None}, "'question', 'answer', 'text' of null"),
        ('{"text": ' + "1" * 5000 + "}", "JSON object"),
    ],
)
def test_what_no_form_reads_is_named_by_line(tmp_path: Path, chatting: Any, line: Any, says: str) -> None:
    parts = chatting
    if "surrogate" in says:
        parts = tokenizer_of()
        parts.chat_template = "{{ messages[0].content[0].text }}"
    path = lines(tmp_path / "a.jsonl", {"text": "fine"}, line)
    with pytest.raises(DataError, match=says) as caught:
        read_texts(path, parts)
    assert f"{path}:2" in str(caught.value)


def test_columns_that_nothing_reads_are_named_once(tmp_path: Path, chatting: Any) -> None:
    rows = [{"messages": [ASK], "text": "t", "id": i, "prompt": None} for i in range(3)]
    path = lines(tmp_path / "a.jsonl", *rows, {"text": "t", "tools": []})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            assert read_texts(path, chatting) == ["[user]q"] * 3 + ["t"]
    assert [(w.category, str(w.message)) for w in caught] == [
        (DataWarning, f"columns that are not used: 'id', 'text', 'tools': {path}")
    ]
