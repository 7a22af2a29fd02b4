"""Tokens to text: pieces that joined are what the tokenizer decodes of all, at one price a token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as NativeTokenizer
from transformers import PreTrainedTokenizerFast

from families import tokenizer_of
from meswitch.engine.spaces import SpaceCleaner, clean_spaces
from meswitch.engine.text import TextDecoder
from meswitch.experts.tokenizers import Tokenizer

WORDS = [".", ",", "!", "?", "'", "n't", "'s", "'ve", "'re", "'m", "the", "a", "don", "o", "é", "数", " "]


def fast(model: Any, decoder: Any, **settings: Any) -> Tokenizer:
    native = NativeTokenizer(model)
    native.decoder = decoder
    if isinstance(decoder, decoders.ByteLevel):
        native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.add_special_tokens(["<s>", "</s>"])
    native.add_special_tokens([AddedToken("<turn>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=native, bos_token="<s>", eos_token="</s>", **settings))


def byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return fast(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]), decoders.ByteLevel())


def metaspace() -> Tokenizer:
    pieces = [piece for word in WORDS for piece in (word, "▁" + word)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(["▁", *pieces]))}
    return fast(models.BPE(vocab=vocab, merges=[]), decoders.Metaspace())


def unigram(**settings: Any) -> Tokenizer:
    pieces = list(dict.fromkeys(["<unk>", "▁", *(piece for word in WORDS for piece in (word, "▁" + word))]))
    return fast(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0), decoders.Metaspace(), **settings)


def wordpiece(**settings: Any) -> Tokenizer:
    pieces = [piece for word in WORDS for piece in (word, "##" + word)]
    vocab = {piece: index for index, piece in enumerate(["[UNK]", *dict.fromkeys(pieces)])}
    return fast(models.WordPiece(vocab=vocab, unk_token="[UNK]"), decoders.WordPiece(), **settings)


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "metaspace": metaspace,
    "unigram": unigram,
    "unigram that cleans spaces": lambda: unigram(clean_up_tokenization_spaces=True),
    "wordpiece": wordpiece,
    "wordpiece that cleans spaces": lambda: wordpiece(clean_up_tokenization_spaces=True),
}


def pieces_of(decoder: TextDecoder, ids: Sequence[int]) -> list[str]:
    pieces = [decoder.add(token) for token in ids if not decoder.stopped]
    return [*pieces, decoder.finish()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_joined_are_what_the_tokenizer_decodes(kind: str) -> None:
    tokenizer, chance = KINDS[kind](), random.Random(3)
    size = len(tokenizer.inner)
    for _ in range(400):
        ids = [chance.randrange(size + 2) for _ in range(chance.randrange(60))]  # two that it does not know
        assert "".join(pieces_of(TextDecoder(tokenizer, ()), ids)) == tokenizer.inner.decode(
            ids, skip_special_tokens=True
        )


@cache
def byte_fallback() -> Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "b": 258}
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(models.BPE(vocab=vocab, merges=[], byte_fallback=True), decoder)


@given(st.text(alphabet="ab é数🙂👩\u200d\u0301", max_size=30))
def test_characters_that_come_as_bytes_are_whole(text: str) -> None:
    letters = {" ": [256], "a": [257], "b": [258]}
    ids = [token for letter in text for token in letters.get(letter, list(letter.encode()))]
    assert "".join(pieces_of(TextDecoder(byte_fallback(), ()), ids)) == text.removeprefix(" ")


def test_text_is_not_held_back_for_long() -> None:
    tokenizer = KINDS["unigram that cleans spaces"]()
    vocab = tokenizer.inner.get_vocab()
    for words in (["▁the", "a", "don"] * 20, ["数"] * 60, ["."] * 60):
        decoder, said, shown = TextDecoder(tokenizer, ()), "", ""
        for word in words:
            said, shown = said + word, shown + decoder.add(vocab[word])
            assert len(said) - len(shown) <= 8


@given(st.lists(st.sampled_from([*WORDS, " .", " ' ", " n", "'t", "v", "e", " '"]), max_size=20), st.integers(1, 4))
def test_spaces_are_cleaned_alike_in_pieces_and_whole(words: list[str], size: int) -> None:
    text, cleaner = "".join(words), SpaceCleaner()
    pieces = [cleaner.add(text[start : start + size]) for start in range(0, len(text), size)]
    assert "".join(pieces) + cleaner.finish() == clean_spaces(text)
    assert clean_spaces(text) == tokenizer_of().clean_up_tokenization(text)


@pytest.mark.parametrize("what", ["special", "unknown", "half a character", "no character"])
def test_a_token_costs_the_same_however_many_came_before(what: str) -> None:
    tokenizer, decoded = byte_level(), []
    half, rest = ids_of(tokenizer, "é")
    token = {"special": 257, "unknown": 5000, "half a character": half, "no character": rest}[what]
    decode = tokenizer.decode

    def counting(ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return decode(ids)

    tokenizer.decode = counting  # type: ignore[method-assign]
    for ids in ([token] * 2000, [*ids_of(tokenizer, "hi"), *[token] * 2000, *ids_of(tokenizer, "hi")]):
        text = "".join(pieces_of(TextDecoder(tokenizer, ()), ids))
        assert text == tokenizer.inner.decode(ids, skip_special_tokens=True)
    assert max(decoded) <= 32


# stop strings with special tokens inside


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, most=1000)


@pytest.mark.parametrize(
    ("stop", "said", "text"),
    [
        ("b<turn>U", "ab<turn>User", "a"),
        ("<turn>U", "ab<turn>User", "ab"),
        ("b<turn>", "ab<turn>User", "a"),
        ("b<turn>U", "ab</s><turn>User", None),  # another special token between
        ("b<turn>U", "ab<turn>ser", None),
        ("bU", "ab<turn>User", "a"),  # text does not show it
        ("</s><turn>", "ab</s><turn>User", "ab"),
        ("<turn>", "ab<tu", None),
    ],
)
def test_a_stop_string_may_hold_special_tokens(stop: str, said: str, text: str | None) -> None:
    tokenizer = byte_level()
    decoder = TextDecoder(tokenizer, [stop])
    ids = ids_of(tokenizer, said)
    found = "".join(pieces_of(decoder, ids))
    assert decoder.stopped == (text is not None)
    assert found == (tokenizer.inner.decode(ids, skip_special_tokens=True) if text is None else text)


def test_a_special_token_that_is_written_letter_by_letter_stops_too() -> None:
    tokenizer = byte_level()
    letters = [token for letter in "a<turn>b" for token in ids_of(tokenizer, letter)]
    decoder = TextDecoder(tokenizer, ["<turn>"])
    assert "".join(pieces_of(decoder, letters)) == "a" and decoder.stopped
