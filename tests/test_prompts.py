"""What callers pass as prompts: taken as ids, text or messages, or refused alike by every way to ask."""

from __future__ import annotations

import array
from collections import UserDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from families import CHAT_TEMPLATE, config_of, save_random, tokenizer_of
from meswitch.engine.engine import Engine
from meswitch.engine.prompt import one_prompt, prompts_of
from meswitch.errors import RequestError
from meswitch.experts.tokenizers import Tokenizer, parts_text

IDS = [1, 2, 3]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    base = save_random(tmp_path_factory.mktemp("prompts") / "base", config_of("llama"))
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    heard: list[str] = []

    def route(prompts: list[str], embed: Any) -> list[Any]:
        heard.extend(prompts)
        return [SimpleNamespace(expert="base", abstained=True) for _ in prompts]

    with Engine(base, router=SimpleNamespace(route=route, heard=heard), kv_budget="8MiB", max_batch_tokens=64) as made:
        yield made


@pytest.mark.parametrize(
    "prompt",
    [
        tuple(IDS),
        range(1, 4),
        numpy.array(IDS),
        numpy.array(IDS, dtype=numpy.uint8),
        list(numpy.array(IDS)),
        torch.tensor(IDS),
        list(torch.tensor(IDS)),
        array.array("i", IDS),
        {"input_ids": IDS},
        UserDict({"input_ids": numpy.array(IDS), "attention_mask": numpy.array([1, 1, 1])}),
        {"input_ids": [0, 0, *IDS], "attention_mask": [0, 0, 1, 1, 1]},
    ],
    ids=repr,
)
def test_one_prompt_of_ids(engine: Engine, prompt: Any) -> None:
    right = engine.generate(IDS, max_new_tokens=2)
    assert engine.generate(prompt, max_new_tokens=2) == right
    assert engine.generate([prompt, IDS], max_new_tokens=2) == [right, right]
    assert "".join(engine.stream(prompt, max_new_tokens=2)) == right.text


@pytest.mark.parametrize(
    "batch",
    [
        [IDS, [4]],
        (IDS, (4,)),
        [numpy.array(IDS), torch.tensor([4])],
        {"input_ids": [IDS, [4]]},
        {"input_ids": torch.tensor([IDS, [0, 0, 4]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 1]])},
    ],
    ids=repr,
)
def test_several_prompts_of_ids(batch: Any) -> None:
    assert prompts_of(batch) == ([IDS, [4]], False)


def test_what_a_tokenizer_returns(engine: Engine) -> None:
    tokenizer = tokenizer_of()
    right = engine.generate("hello", max_new_tokens=2)
    for tensors in (None, "np", "pt"):
        encoded = tokenizer("hello", return_tensors=tensors)
        found = engine.generate(encoded, max_new_tokens=2)
        assert found == (right if tensors is None else [right])
        assert one_prompt(encoded) == tokenizer("hello")["input_ids"]
    both = tokenizer(["hello", "x"], return_tensors="pt", padding=True, padding_side="left")
    assert prompts_of(both) == (tokenizer(["hello", "x"])["input_ids"], False)


def test_arrays_of_prompts() -> None:
    assert prompts_of(numpy.array([IDS, IDS])) == ([IDS, IDS], False)
    assert prompts_of(numpy.array(["a", "b"])) == (["a", "b"], False)
    assert prompts_of([]) == ([], False)


WRONG = [
    None,
    5,
    True,
    1.5,
    {1, 2},
    b"bytes",
    bytearray(b"bytes"),
    memoryview(b"bytes"),
    "smile \ud83d",
    "caf\udce9",
    {"role": "user", "content": "hello"},
    {},
    {"input_ids": None},
    {"input_ids": [1, 2], "attention_mask": [1]},
    [1, "a"],
    [1.0, 2.0],
    [True],
    [None],
    [-1],
    [2**70],
    numpy.array([0.5]),
    numpy.array(3),
    torch.tensor([True]),
    torch.zeros(1, 1, 2, dtype=torch.int64),
]


@pytest.mark.parametrize("prompt", WRONG, ids=repr)
@pytest.mark.parametrize("expert", ["base", "auto"])
def test_what_is_no_prompt_is_refused_by_every_way_to_ask(engine: Engine, prompt: Any, expert: str) -> None:
    for ask in (engine.generate, engine.stream, lambda prompt, name: engine.generate([prompt, "hello"], name)):
        with pytest.raises(RequestError):
            ask(prompt, expert)


@pytest.mark.parametrize(
    "messages",
    [
        *(None, 5, "hello", [], {}, [None], ["hello"], [[]], [{"content": "hello"}], [{"role": "user"}]),
        {"role": "user", "content": "hello"},
        [{"role": 3, "content": "hello"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": b"hello"}],
        [{"role": "user", "content": "smile \ud83d"}],
        [{"role": "user", "content": [{"type": "text", "text": "smile \ud83d"}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x.png"}]}],
        [{"role": "user \ud83d", "content": "hello"}],
    ],
    ids=repr,
)
@pytest.mark.parametrize("expert", ["base", "auto"])
def test_what_is_no_conversation_is_refused(engine: Engine, messages: Any, expert: str) -> None:
    with pytest.raises(RequestError):
        engine.chat(messages, expert)
    with pytest.raises(RequestError):
        engine.chat(messages, expert, stream=True)


# content in parts

PARTS = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
READS_PARTS = (
    "{% for m in messages %}{% for part in m.content %}<{{ part.type }}>{{ part.text }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHAT_TEMPLATE, "<user>hello\nthere<assistant>"),
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}", "hello\nthere"),
        ("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}", "<hello\nthere>"),
        (READS_PARTS, "<text>hello<text>there"),
    ],
)
def test_a_template_that_knows_no_parts_gets_their_text(template: str, text: str) -> None:
    inner = tokenizer_of()
    inner.chat_template = template
    said = [{"role": "user", "content": PARTS}]
    messages, rendered = Tokenizer(inner).render(said)
    assert rendered == text and said == [{"role": "user", "content": PARTS}]
    ids = Tokenizer(inner).encode_chat(said, most=100)
    assert ids == inner(text, add_special_tokens=False)["input_ids"] and messages


def test_parts_that_are_no_text_are_named() -> None:
    assert parts_text(["a", *PARTS]) == "a\nhello\nthere"
    with pytest.raises(RequestError, match="image_url"):
        parts_text([{"type": "image_url", "image_url": "x.png"}])


@pytest.mark.parametrize(
    ("ask", "prompt", "heard"),
    [
        ("generate", "hello", "hello"),
        ("generate", [104, 105], "©ª"),
        ("chat", [{"role": "user", "content": "hello"}], "hello"),
        ("chat", [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "x"}], "hello\nthere"),
        ("chat", [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}], "two"),
    ],
)
def test_a_router_reads_text(engine: Engine, ask: str, prompt: Any, heard: str) -> None:
    getattr(engine, ask)(prompt, "auto", max_new_tokens=1)
    router: Any = engine._preparation._routing._router
    if prompt == [104, 105]:
        heard = tokenizer_of().decode(prompt)
    assert router.heard[-1] == heard


# settings of a call


def test_the_hint_of_an_unknown_setting_names_all(engine: Engine) -> None:
    with pytest.raises(
        RequestError, match=r"unknown setting: max_tokens\nhint: known: .*max_new_tokens.*seed.*stop.*timeout"
    ):
        engine.generate(IDS, max_tokens=5)


def test_numbers_of_numpy_are_numbers(engine: Engine) -> None:
    given: dict[str, Any] = {"max_new_tokens": numpy.int64(3), "temperature": numpy.float32(0.5), "top_k": 2**70}
    right = engine.generate(IDS, max_new_tokens=3, temperature=0.5, top_k=0, seed=7)
    assert engine.generate(IDS, seed=numpy.int32(7), **given).token_ids == right.token_ids
    assert len(engine.generate([IDS, IDS], seed=numpy.array([1, 2**40]), max_new_tokens=1)) == 2
    assert engine.generate(IDS, seed=2**200, temperature=1.0, max_new_tokens=2).finish_reason == "length"
