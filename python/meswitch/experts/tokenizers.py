"""Tokenizers, shared by content: models with equal tokenizer files have one between them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from meswitch.errors import RequestError
from meswitch.experts.files import SmallFiles, written_out
from meswitch.huggingface.config import parse_json
from meswitch.huggingface.files import TOKENIZER, VOCABULARY, matches
from meswitch.huggingface.text import load_tokenizer

_MOST_KEPT = 16
"""Tokenizers that stay built. One of 128,000 tokens takes tens of megabytes and is built in under a second."""


class Tokenizer:
    """A tokenizer of transformers that any number of threads may use at once, the engine's among them.

    A fast tokenizer is borrowed mutably when its truncation, padding or `encode_special_tokens` change, and
    transformers changes those that differ before it encodes. Here they are set once, so that encoding and decoding
    change nothing and need no lock. A tokenizer written in Python encodes one text at a time.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        fast = getattr(inner, "backend_tokenizer", None)
        self._encoding: Any = nullcontext() if fast is not None else threading.Lock()
        if fast is not None:
            fast.no_truncation()
            fast.no_padding()
            fast.encode_special_tokens = inner.split_special_tokens

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a sequence."""
        return None if self.inner.bos_token_id is None else int(self.inner.bos_token_id)

    @cached_property
    def hidden(self) -> dict[int, str]:
        """The tokens that decoded text does not show, by id: special ones, also those without a name of their own."""
        added = {index: str(token) for index, token in self.inner.added_tokens_decoder.items() if token.special}
        named = zip(self.inner.all_special_ids, self.inner.all_special_tokens, strict=True)
        special = {**added, **{int(index): str(text) for index, text in named if index is not None}}
        return {index: text for index, text in special.items() if not self.decode([index])}

    @cached_property
    def cleans_spaces(self) -> bool:
        """Whether transformers takes spaces out before punctuation when it decodes, which `decode` does not."""
        if not self.inner.clean_up_tokenization_spaces:
            return False
        model = getattr(getattr(self.inner, "backend_tokenizer", None), "model", None)
        anyway = self.inner.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
        return type(model).__name__ != "BPE" or bool(anyway)

    @cached_property
    def most_characters(self) -> int:
        """The characters of the longest token."""
        return max(map(len, self.inner.get_vocab()), default=1)

    def encode(self, text: str, *, most: int) -> list[int]:
        """The ids of a text, with what the tokenizer adds to every sequence.

        Raises `RequestError` for text that is not Unicode, or so long that it has more than `most` tokens whatever
        they are.
        """
        self.check(text, most=most)
        with self._encoding:
            return list(self.inner(text, verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, most: int) -> list[int]:
        """The ids of a conversation under the chat template; raises what `encode` and `render` raise."""
        messages, text = self.render(messages)
        self.check(text, most=most)
        with self._encoding:
            encoded = self.inner.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        return list(encoded["input_ids"])

    def render(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """The messages as the chat template takes them, and their text.

        Content in parts goes to the template as it is; a template that knows none, and fails or writes the list itself
        out, gets the text of the parts. Raises `RequestError` where the template refuses.
        """
        own = [dict(message) for message in messages]
        parts = [message["content"] for message in own if isinstance(message.get("content"), list | tuple)]
        try:
            text = self._rendered(own)
        except RequestError:
            if not parts:
                raise
        else:
            if not any(str(part) in text for part in parts):
                return own, text
        for message in own:
            if isinstance(message.get("content"), list | tuple):
                message["content"] = parts_text(message["content"])
        return own, self._rendered(own)

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        try:
            return str(self.inner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template is a program and may raise anything
            raise RequestError(f"the chat template refuses these messages: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens and with all spaces."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def check(self, text: str, *, most: int) -> None:
        """Raises `RequestError` for text that cannot be encoded, or that has more than `most` tokens for certain."""
        check_unicode(text)
        if len(text) > most and len(text) > most * self.most_characters:
            raise RequestError(
                f"the prompt is too long: expected less than {most} tokens, "
                f"found {len(text)} characters in tokens of at most {self.most_characters}",
                hint="shorten the prompt",
            )


def check_unicode(text: str, what: str = "prompt") -> None:
    """Raises `RequestError` for a lone surrogate: half a character, or a byte that was no UTF-8 where it was read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what}: expected Unicode text, found the lone surrogate {text[error.start]!r} at character {error.start}",
            hint="the text was not UTF-8 where it was read, or was cut within a character",
        ) from None


def parts_text(parts: Iterable[Any]) -> str:
    """The text of content in parts, a line each. Raises `RequestError` for a part that is not text."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise RequestError(
                f'content: expected parts such as {{"type": "text", "text": "..."}}, found {repr(part)[:80]}',
                hint="the chat template reads no other parts",
            )
        texts.append(text)
    return "\n".join(texts)


@dataclass(frozen=True)
class TokenizerFiles:
    """The files that make a tokenizer, and `key`, by which equal ones are known."""

    files: SmallFiles
    key: tuple[Any, ...]

    @classmethod
    def of(cls, files: SmallFiles, base: SmallFiles | None = None) -> TokenizerFiles | None:
        """The tokenizer among a model's files; `None` where there is none.

        A model that brings a template or settings without a vocabulary has them with the vocabulary of `base`.
        """
        names = matches(files, TOKENIZER)
        if base is not None and not matches(names, VOCABULARY):
            files = {**{name: base[name] for name in matches(base, TOKENIZER)}, **files}
            names = matches(files, TOKENIZER)
        if not matches(names, VOCABULARY):
            return None
        # transformers looks into config.json for the tokenizer's class; nothing else of it matters here.
        config = parse_json(files["config.json"].data) if "config.json" in files else {}
        identity = tuple(str(config.get(field)) for field in ("model_type", "tokenizer_class", "model_name"))
        contents = sorted((name, files[name].checksum) for name in names)
        wanted = {name: files[name] for name in ("config.json", *names) if name in files}
        return cls(wanted, (identity, *contents))


class _Entry:
    def __init__(self) -> None:
        self.building = threading.Lock()
        self.tokenizer: Tokenizer | None = None


class TokenizerStore:
    """Tokenizers by content, built when they are first needed. May be used from any thread but the engine's.

    Whoever needs a tokenizer that is being built waits for it, and nobody else does.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[Any, ...], _Entry] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def get(self, source: TokenizerFiles) -> Tokenizer:
        """The tokenizer of these files. Raises `CheckpointError` for files that do not load."""
        with self._lock:
            entry = self._entries.setdefault(source.key, _Entry())
            self._entries.move_to_end(source.key)
            if len(self._entries) > _MOST_KEPT:
                self._entries.popitem(last=False)
        with entry.building:
            if entry.tokenizer is None:
                with written_out(source.files) as folder:
                    entry.tokenizer = Tokenizer(load_tokenizer(folder))
            return entry.tokenizer
