"""What callers pass as prompts and conversations, brought into one form: text, token ids, or messages.

    text                                                        one prompt
    whole numbers in a list, tuple, array or tensor             one prompt of token ids
    what a tokenizer returns: a mapping with `input_ids`        those ids, without what `attention_mask` hides
    a list of these, an array or tensor [n, length]             n prompts

Anything else is a `RequestError`, the same one from `generate`, `stream` and `chat`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, NoReturn, TypeAlias

import numpy
import torch

from meswitch.errors import RequestError
from meswitch.experts.tokenizers import check_unicode, parts_text

Prompt: TypeAlias = str | Sequence[int] | numpy.ndarray[Any, Any] | torch.Tensor | Mapping[str, Any]
"""What a caller may pass for one prompt: text, ids `[length]`, or a mapping with `input_ids`."""

Conversation: TypeAlias = Sequence[Mapping[str, Any]]


def prompts_of(given: Any) -> tuple[list[str | list[int]], bool]:
    """The prompts of a call, and whether it was one by itself.

    >>> prompts_of((1, 2)), prompts_of(["one", [3]])
    (([[1, 2]], True), (['one', [3]], False))
    """
    if isinstance(given, Mapping):
        given = _input_ids(given)
    given = _as_list(given)
    if isinstance(given, str):
        return [_text(given)], True
    if not isinstance(given, list):
        _refuse(given)
    if given and _is_number(given[0]):
        return [_ids(given)], True
    return [_ids(prompt) if isinstance(prompt, list | tuple) else one_prompt(prompt) for prompt in given], False


def one_prompt(given: Any) -> str | list[int]:
    """One prompt: text, or token ids. A batch of one, as tokenizers return it, is that one."""
    if isinstance(given, Mapping):
        given = _input_ids(given)
    given = _as_list(given)
    if isinstance(given, str):
        return _text(given)
    if not isinstance(given, list):
        _refuse(given)
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = given[0]
    return _ids(given)


def conversations_of(given: Any) -> tuple[list[list[Mapping[str, Any]]], bool]:
    """The conversations of a call, and whether it was one by itself."""
    if isinstance(given, Mapping):
        raise RequestError(
            f"expected a list of messages, found one mapping: {repr(given)[:80]}", hint="put a message into a list"
        )
    if not isinstance(given, list | tuple) or not given:
        _refuse_messages(given)
    if isinstance(given[0], Mapping):
        return [_messages(given)], True
    return [_messages(conversation) for conversation in given], False


def routing_text(prompt: str | list[int] | list[Mapping[str, Any]]) -> str | list[int]:
    """What a router reads of a prompt: its text, the last message of a conversation's user, or ids to decode."""
    if isinstance(prompt, str):
        return prompt
    said = [message for message in prompt if isinstance(message, Mapping)]
    if not said:
        return prompt  # type: ignore[return-value]
    users = [message for message in said if message["role"] == "user"]
    content = users[-1].get("content") if users else None
    if isinstance(content, list | tuple):
        texts = [part for part in content if not isinstance(part, Mapping) or "text" in part]  # a router sees no image
        return parts_text(texts)
    return content or ""


def checked_ids(ids: list[int], vocabulary: int) -> list[int]:
    """`ids`, at least one, all below `vocabulary`. Raises `RequestError`."""
    if not ids:
        raise RequestError("the prompt is empty and the tokenizer has no beginning-of-sequence token")
    if min(ids) < 0 or max(ids) >= vocabulary:
        wrong = next(token for token in ids if not 0 <= token < vocabulary)
        raise RequestError(f"expected token ids from 0 to {vocabulary - 1}, found {wrong}")
    return ids


def _as_list(given: Any) -> Any:
    """Arrays, tensors, tuples and ranges as lists; all else as it is."""
    if hasattr(given, "tolist") and not isinstance(given, memoryview):
        return given.tolist()
    return list(given) if isinstance(given, tuple | range) else given


def _input_ids(encoding: Mapping[str, Any]) -> Any:
    """The ids of what a tokenizer returned."""
    if "input_ids" not in encoding:
        raise RequestError(
            f"expected a prompt, found a mapping without 'input_ids': {', '.join(map(repr, encoding)) or 'empty'}",
            hint="conversations are for chat",
        )
    ids, mask = _as_list(encoding["input_ids"]), _as_list(encoding.get("attention_mask"))
    if not isinstance(ids, list):
        _refuse(ids)
    if mask is None:
        return ids
    if _is_row(ids):
        return _visible(ids, mask)
    if not isinstance(mask, list) or len(mask) != len(ids):
        raise RequestError(f"attention_mask: expected the shape of input_ids, {len(ids)} rows, found another")
    return [_visible(_as_list(row), _as_list(visible)) for row, visible in zip(ids, mask, strict=True)]


def _visible(ids: Any, mask: Any) -> Any:
    if not isinstance(ids, list) or not isinstance(mask, list) or len(ids) != len(mask):
        raise RequestError("attention_mask: expected the shape of input_ids, found another")
    return [token for token, visible in zip(ids, mask, strict=True) if visible]


def _is_number(value: Any) -> bool:
    return getattr(value, "ndim", None) == 0 or not hasattr(value, "__len__")


def _is_row(values: Sequence[Any]) -> bool:
    return not values or _is_number(values[0])


def _ids(values: Sequence[Any]) -> list[int]:
    if all(type(value) is int for value in values):
        return list(values)
    ids = []
    for value in values:
        try:
            if isinstance(value, bool):
                raise TypeError
            ids.append(index(value))
        except TypeError:
            raise RequestError(f"expected token ids, whole numbers, found {repr(value)[:80]}") from None
    return ids


def _text(text: str) -> str:
    check_unicode(text)
    return text


def _messages(given: Any) -> list[Mapping[str, Any]]:
    if not isinstance(given, list | tuple) or not given:
        _refuse_messages(given)
    for message in given:
        known = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not known or ("content" not in message and "tool_calls" not in message):
            _refuse_messages(given)
        content = message.get("content")
        if content is not None and not isinstance(content, str | list | tuple):
            _refuse_messages(given)
        for part in [content] if isinstance(content, str) else content or ():
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                check_unicode(text)
    return list(given)


def _refuse(given: Any) -> NoReturn:
    hint = "decode it first" if isinstance(given, bytes | bytearray | memoryview) else None
    raise RequestError(
        f"expected a prompt, text or token ids, or a list of prompts; found {type(given).__name__}: {repr(given)[:80]}",
        hint=hint,
    )


def _refuse_messages(given: Any) -> NoReturn:
    hint = "use generate for text" if isinstance(given, str) else None
    raise RequestError(
        'expected messages such as {"role": "user", "content": "..."}, found ' + repr(given)[:80], hint=hint
    )
