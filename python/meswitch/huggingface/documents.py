"""Data files to documents: a `.txt` is one, a `.jsonl` has one a line, in the columns that data sets have.

    {"text"}                                    as it is
    {"prompt"[, "completion"]}                  joined, nothing between; lists of messages by the chat template
    {"messages"}                                by the tokenizer's chat template
    {"conversations"[, "system"]}               by the chat template, also as ShareGPT's {"from", "value"}
    {"instruction"[, "input", "output"]}        a user's and an assistant's message, by the chat template

`"response"` and `"output"` are other names of `"completion"`; `"tools"` go to the template, `"system"` before messages.
A null is a column that is not there. Columns that are not read are named in a `DataWarning`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from meswitch.errors import DataError, DataWarning
from meswitch.huggingface.config import parse_json

_ANSWERS = ("completion", "response", "output")
_PREFERENCES = ("chosen", "rejected")
_LABEL = "expert"  # of labelled prompts, which are text too
_SHAREGPT_ROLES = {
    **{name: "user" for name in ("human", "user")},
    **{name: "assistant" for name in ("gpt", "assistant")},
    **{name: "tool" for name in ("observation", "tool")},
    "system": "system",
}

Messages: TypeAlias = list[dict[str, Any]]


def read_texts(path: str | Path, tokenizer: Any) -> list[str]:
    """The documents of a data file, without empty ones; the module says which forms there are.

    Raises `DataError` with file and line, `OSError` if the file cannot be opened. Warns of columns that are not used.
    """
    path = Path(path)
    path.stat()  # a file that is missing is missing, whatever its name
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"expected a .txt or .jsonl file, found {path.name}", hint="rename it to say which it is")
    texts = [_decode(path)] if path.suffix == ".txt" else _read_lines(path, tokenizer)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"expected text, found an empty file: {path}")
    return texts


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("file:line", object)` of each line of a `.jsonl` file that is not blank. Raises `DataError`."""
    # Not splitlines(): a JSON string may contain U+2028 and other line separators.
    for number, line in enumerate(_decode(Path(path)).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line)
        except ValueError as error:  # a number of 5,000 digits is a ValueError of its own
            raise DataError(f"expected a JSON object a line, found {_short(line)}: {where}") from error
        if not isinstance(value, dict):
            raise DataError(f"expected a JSON object a line, found {type(value).__name__}: {where}")
        yield where, value


def string_field(line: Mapping[str, Any], key: str, where: str) -> str:
    """`line[key]`. Raises `DataError`, with `where` in its text, if that is not a string of Unicode text."""
    value = line.get(key)
    if not isinstance(value, str):
        found = "nothing" if key not in line else "null" if value is None else type(value).__name__
        raise DataError(f"expected a string under {key!r}, found {found}: {where}")
    return _check_text(value, f"under {key!r}", where)


def warn_of_unused(columns: Iterable[str], path: str | Path) -> None:
    """Names, once a process, the columns of a data file that nothing reads."""
    if names := ", ".join(map(repr, sorted(columns))):
        warnings.warn(f"columns that are not used: {names}: {path}", DataWarning, stacklevel=1)


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"expected UTF-8 text, found byte {error.object[error.start]:#04x}: {path}") from error


def _check_text(text: str, what: str, where: str) -> str:
    # A lone surrogate is valid JSON but not text, and tokenizers raise errors of their own for it.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"expected text {what}, found a lone surrogate: {where}")
    return text


class _Columns:
    """The columns of one line that are not null, and which of them were read."""

    def __init__(self, line: Mapping[str, Any], where: str) -> None:
        self.where = where
        self.names = list(line)
        self._values = {key: value for key, value in line.items() if value is not None}
        self._read = {_LABEL}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def text(self, key: str) -> str:
        """The string under `key`, an empty one if there is none. Raises `DataError` for anything else."""
        self._read.add(key)
        return string_field(self._values, key, self.where) if key in self else ""

    def unread(self) -> set[str]:
        return self._values.keys() - self._read


def _read_lines(path: Path, tokenizer: Any) -> list[str]:
    texts: list[str] = []
    unused: set[str] = set()
    for where, line in json_lines(path):
        columns = _Columns(line, where)
        texts.append(_check_text(_text(columns, tokenizer), "in the line", where))
        unused |= columns.unread()
    warn_of_unused(unused, path)
    return texts


def _text(columns: _Columns, tokenizer: Any) -> str:
    for column, render in _FORMS.items():
        if column in columns:
            return render(columns, tokenizer)
    _answer(columns)  # says more of a line of preferences alone
    forms = ", ".join(f'{{"{column}"}}' for column in _FORMS)
    found = ", ".join(f"{name!r}" if name in columns else f"{name!r} of null" for name in columns.names) or "no key"
    raise DataError(f"expected one of {forms}, found {found}: {columns.where}")


def _answer(columns: _Columns) -> str | None:
    """The column with the line's answer, if it has one. Raises `DataError` where there are several, or preferences."""
    found = [key for key in (*_ANSWERS, *_PREFERENCES) if key in columns]
    if len(found) > 1 or any(key in _PREFERENCES for key in found):
        raise DataError(
            f"expected one answer a line, found {', '.join(map(repr, found))}: {columns.where}",
            hint='keep the one that the fine-tune should give, as "completion"',
        )
    return found[0] if found else None


def _render_prompt(columns: _Columns, tokenizer: Any) -> str:
    answer = _answer(columns)
    if isinstance(columns.get("prompt"), list):
        keys = ["prompt"] if answer is None else ["prompt", answer]
        return _render([message for key in keys for message in _messages(columns, key)], columns, tokenizer)
    return columns.text("prompt") + ("" if answer is None else columns.text(answer))


def _render_messages(columns: _Columns, tokenizer: Any) -> str:
    return _render(_messages(columns, "messages"), columns, tokenizer)


def _render_conversations(columns: _Columns, tokenizer: Any) -> str:
    turns = columns.get("conversations")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "from" in turn for turn in turns):
        messages = [_turn(turn, columns.where) for turn in turns]
    else:
        messages = _messages(columns, "conversations")
    return _render(_system(columns) + messages, columns, tokenizer)


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = _SHAREGPT_ROLES.get(string_field(turn, "from", where))
    if role is None:
        raise DataError(f"expected one of {', '.join(_SHAREGPT_ROLES)} under 'from', found {turn['from']!r}: {where}")
    return {"role": role, "content": string_field(turn, "value", where)}


def _render_instruction(columns: _Columns, tokenizer: Any) -> str:
    question, answer = [columns.text("instruction"), columns.text("input")], _answer(columns)
    messages = [*_system(columns), {"role": "user", "content": "\n\n".join(filter(None, question))}]
    if answer is not None:
        messages.append({"role": "assistant", "content": columns.text(answer)})
    return _render(messages, columns, tokenizer)


def _system(columns: _Columns) -> Messages:
    text = columns.text("system")
    return [{"role": "system", "content": text}] if text else []


def _messages(columns: _Columns, key: str) -> Messages:
    """The messages under `key`, without what is null in them but a tool call's content."""
    messages, where = columns.get(key), columns.where
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise DataError(f"expected a list of messages under {key!r}, found {_short(repr(messages))}: {where}")
    for message in messages:
        string_field(message, "role", where)
        content = message.get("content")
        in_parts = isinstance(content, list) and bool(content) and all(isinstance(part, dict) for part in content)
        if not in_parts and (content is not None or not message.get("tool_calls")):
            string_field(message, "content", where)
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]


def _render(messages: Messages, columns: _Columns, tokenizer: Any) -> str:
    """What the tokenizer's chat template writes for the messages, and for the line's tools."""
    where = columns.where
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"expected a tokenizer with a chat template for messages, found one without: {where}",
            hint='give {"text"} or {"prompt", "completion"} lines',
        )
    tools = columns.get("tools")
    try:
        tools = parse_json(tools or "null") if isinstance(tools, str) else tools
        return str(tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False))
    except Exception as error:  # a template is a program that may raise anything
        raise DataError(f"expected messages the chat template accepts, found {error}: {where}") from error


_FORMS: dict[str, Callable[[_Columns, Any], str]] = {
    "messages": _render_messages,
    "conversations": _render_conversations,
    "text": lambda columns, _: columns.text("text"),
    "prompt": _render_prompt,
    "instruction": _render_instruction,
}
"""The forms of a line by the column that shows them, in the order in which they are looked for."""


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "…")
