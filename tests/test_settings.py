"""Tokenizer, template and generation config of an expert: read when it is opened, kept once, its own or nobody's."""

from __future__ import annotations

import base64
import gc
import json
import logging
import os
import shutil
import threading
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as NativeTokenizer
from transformers import AutoModelForCausalLM

from families import CHAT_TEMPLATE, config_of, save_finetune, save_random, tokenizer_of
from meswitch.compression.job import compress
from meswitch.delta.directory import Delta
from meswitch.delta.restoration import restore
from meswitch.engine.engine import Engine
from meswitch.errors import CheckpointError, ChecksumError, FormatError, RequestError
from meswitch.experts import tokenizers
from meswitch.experts.settings import SettingsReader
from meswitch.experts.tokenizers import Tokenizer
from meswitch.huggingface.config import text_config

PROMPT = "hello there"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("settings") / "base", config_of("llama"))


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    folder = save_finetune(base.parent / "tuned", base, 1)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


Make = Callable[..., Path]


@pytest.fixture
def make(base: Path, tuned: Path, tmp_path: Path) -> Make:
    """Compresses the fine-tune with other small files (`None` removes one) to `experts/NAME`."""

    def make(name: str, **files: Any) -> Path:
        source = tmp_path / f"source-{name}"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(tuned, source)
        for stem, content in files.items():
            file = source / f"{stem}.json"
            if content is None:
                file.unlink()
            else:
                text = content if isinstance(content, str) else json.dumps(content)
                file.write_bytes(text.encode("utf-8", "surrogateescape"))
        out = tmp_path / "experts" / name
        compress(base, source, out)
        return out

    return make


def engine_of(base: Path, **settings: Any) -> Engine:
    return Engine(base, **{"kv_budget": "8MiB", "max_batch_tokens": 64, "exact": True, **settings})


def with_letters_reversed(folder: Path) -> dict[str, Any]:
    """A tokenizer.json that reads letters in another order than the one in `folder`."""
    own: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    own["model"]["vocab"] = {letter: 255 - index for letter, index in own["model"]["vocab"].items()}
    return own


def changed_config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((folder / "config.json").read_text()), **changes}


# read when opened


@pytest.fixture
def own(make: Make, tuned: Path) -> Path:
    """An expert that is nothing like the base: its letters, its end of a sequence."""
    return make("a", generation_config={"eos_token_id": list(range(100))}, tokenizer=with_letters_reversed(tuned))


def asked(engine: Engine) -> Any:
    return engine.generate(PROMPT, expert="a", max_new_tokens=20)


@pytest.fixture
def right(base: Path, own: Path) -> Any:
    with engine_of(base, experts={"a": own}) as engine:
        answer = asked(engine)
    with engine_of(base) as engine:
        assert engine.generate(PROMPT, max_new_tokens=20).token_ids != answer.token_ids
    assert answer.finish_reason == "stop"
    return answer


def deleted(expert: Path, make: Make) -> None:
    shutil.rmtree(expert)


def renamed(expert: Path, make: Make) -> None:
    expert.rename(expert.parent / "elsewhere")


def replaced(expert: Path, make: Make) -> None:
    shutil.rmtree(expert)
    make("a", generation_config={"eos_token_id": 257})


def left(expert: Path, make: Make) -> None:
    os.chdir("/")


@pytest.mark.parametrize("happens", [deleted, renamed, replaced, left])
def test_an_expert_stays_what_was_opened(
    base: Path, own: Path, right: Any, make: Make, happens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent.parent)
    here = Path(os.path.relpath(base))
    with engine_of(here, experts="experts") as engine:
        happens(own, make)
        assert asked(engine) == right


def test_the_base_stays_what_was_opened(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(base, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with engine_of(Path("base")) as engine:
        shutil.rmtree(tmp_path / "base")
        monkeypatch.chdir("/")
        assert engine.generate(PROMPT, max_new_tokens=2).prompt_tokens == len(PROMPT)


def test_a_file_that_is_not_what_was_written_is_refused(own: Path) -> None:
    delta = Delta.open(own)
    assert json.loads(delta.read_file("config.json"))["model_type"] == "llama"
    text = (own / "generation_config.json").read_text()
    (own / "generation_config.json").write_text(text.replace("1", "2"))
    with pytest.raises(ChecksumError, match=r"generation_config\.json"):
        delta.read_file("generation_config.json")
    (own / "generation_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        delta.read_file("generation_config.json")
    with pytest.raises(ValueError, match=r"found delta\.safetensors"):  # tensors are none of the small files
        delta.read_file("delta.safetensors")


# whose settings


@pytest.mark.parametrize(
    ("of_base", "of_expert"),
    [
        ({"eos_token_id": 257}, list(range(128))),
        ({"eos_token_id": list(range(128))}, 257),
        ({"eos_token_id": 257, "repetition_penalty": 1.8}, 257),
    ],
)
def test_without_a_generation_config_an_expert_has_its_own_config(
    base: Path, make: Make, tuned: Path, tmp_path: Path, of_base: dict[str, Any], of_expert: Any
) -> None:
    expert = make("a", generation_config=None, config=changed_config(tuned, eos_token_id=of_expert))
    restore(base, expert, tmp_path / "restored")
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(of_base))
    with engine_of(tmp_path / "base", experts={"a": expert}) as engine:
        said = engine.generate([1, 2, 3], expert="a", max_new_tokens=20).token_ids
    assert said == greedy(tmp_path / "restored", [1, 2, 3], max_new_tokens=20)


def greedy(folder: Path, ids: list[int], **settings: Any) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    given = torch.tensor([ids])
    found: list[int] = model.generate(given, attention_mask=torch.ones_like(given), **settings)[0, len(ids) :].tolist()
    return found


def test_an_expert_without_a_vocabulary_has_its_own_template_with_the_bases(
    base: Path, make: Make, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text("never {{ messages[0]['content'] }}")
    reader = SettingsReader(tmp_path / "base", text_config(base))
    expert = reader.read("a", Delta.open(make("a", tokenizer=None, tokenizer_config=None)))
    message = [{"role": "user", "content": "x"}]
    assert expert.required_tokenizer.render(message)[1] == "<user>x<assistant>"
    assert reader.base.required_tokenizer.render(message)[1] == "never x"


@pytest.mark.parametrize(
    ("file", "content", "error"),
    [
        ("generation_config", "{", "generation_config.json"),
        ("generation_config", "[]", "generation_config.json"),
        ("generation_config", {"max_new_tokens": 0}, "max_new_tokens"),
        ("generation_config", {"eos_token_id": "</s>"}, "eos_token_id"),
        ("generation_config", "[" * 100_000, "generation_config.json"),
    ],
)
def test_settings_that_cannot_be_read_are_found_when_opened(
    base: Path, make: Make, file: str, content: Any, error: str
) -> None:
    reader, delta = SettingsReader(base, text_config(base)), Delta.open(make("a", **{file: content}))
    with pytest.raises(FormatError, match=error) as caught:
        reader.read("a", delta)
    assert "/meswitch-" not in str(caught.value)  # the folder that transformers read it from


@pytest.mark.parametrize("broken", ["{}", "[", '{"model": {"type": "BPE", "vocab": 3, "merges": []}}', "\udcff"])
def test_a_tokenizer_that_does_not_load_names_its_expert(base: Path, make: Make, broken: str) -> None:
    reader = SettingsReader(base, text_config(base))
    expert = reader.read("a", Delta.open(make("a", tokenizer=broken)))
    with pytest.raises(CheckpointError, match="the tokenizer of expert 'a' does not load"):
        _ = expert.tokenizer


# shared by content


def tekken(*special: str) -> dict[str, Any]:
    """Mistral's own file of a tokenizer: these special tokens, every byte, and two words."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"hello"]
    coded = [base64.b64encode(token).decode() for token in tokens]
    return {
        "config": {
            "pattern": r"[^\s]+|\s+",
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(special) + len(tokens),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [{"rank": rank, "token_bytes": token, "token_str": None} for rank, token in enumerate(coded)],
        "special_tokens": [{"rank": r, "token_str": text, "is_control": True} for r, text in enumerate(special)],
    }


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tekken_alone_is_a_tokenizer(family: str, tmp_path: Path) -> None:
    """Also where the package mistral-common is installed, whose tokenizer transformers would take."""
    special = {"base": ["<unk>", "<s>", "</s>"], "finetune": ["<unk>", "<s>", "</s>", "[A]", "[B]"]}
    base = save_random(tmp_path / "base", config_of(family))
    save_finetune(tmp_path / "finetune", base, 1)
    for name, tokens in special.items():
        for file in (tmp_path / name).glob("*token*"):
            file.unlink()
        (tmp_path / name / "tekken.json").write_text(json.dumps(tekken(*tokens)))
    compress(base, tmp_path / "finetune", tmp_path / "expert")
    restore(base, tmp_path / "expert", tmp_path / "restored")
    with engine_of(base, experts={"math": tmp_path / "expert"}) as engine:
        for expert, folder, count in (("base", base, 3), ("math", tmp_path / "restored", 5)):
            answer = engine.generate("hello", expert=expert, max_new_tokens=4, temperature=0)
            assert (folder / "tekken.json").is_file() and not list(folder.glob("tokenizer*"))
            assert answer.prompt_tokens == 1
            assert answer.token_ids == greedy(folder, [count + 257], max_new_tokens=4, do_sample=False)


def test_equal_tokenizers_are_one(base: Path, make: Make, tuned: Path) -> None:
    reader = SettingsReader(base, text_config(base))
    same = [reader.read(name, Delta.open(make(name))) for name in ("a", "b")]
    other = reader.read("c", Delta.open(make("c", tokenizer=with_letters_reversed(tuned))))
    assert same[0].tokenizer is same[1].tokenizer is not other.tokenizer
    files = [settings.tokenizer_files for settings in (*same, reader.base)]
    contents = [one.files["tokenizer.json"] for one in files if one is not None]
    assert contents[0] is contents[1] is contents[2]  # the base's


def test_an_expert_with_the_bases_tokenizer_files_has_the_bases_tokenizer(base: Path, tmp_path: Path) -> None:
    compress(base, save_finetune(tmp_path / "tuned", base, 2), tmp_path / "a")
    reader = SettingsReader(base, text_config(base))
    assert reader.read("a", Delta.open(tmp_path / "a")).tokenizer is reader.base.tokenizer


def test_what_nobody_holds_is_forgotten(base: Path, make: Make, tuned: Path) -> None:
    reader = SettingsReader(base, text_config(base))
    path = make("a", tokenizer=with_letters_reversed(tuned))
    expert: Any = reader.read("a", Delta.open(path))
    checksum = Delta.open(path).files["tokenizer.json"]
    assert checksum in reader._contents._contents
    del expert
    assert checksum not in reader._contents._contents


def test_few_tokenizers_stay_built(base: Path, make: Make, tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers, "_MOST_KEPT", 2)
    reader = SettingsReader(base, text_config(base))
    models = [reader.base, reader.read("a", Delta.open(make("a")))]
    models.append(reader.read("b", Delta.open(make("b", tokenizer=with_letters_reversed(tuned)))))
    built = [weakref.ref(model.required_tokenizer) for model in models]
    gc.collect()
    assert [one() is None for one in built] == [True, False, False]
    assert models[1].tokenizer is built[1]() and reader.base.required_tokenizer.encode("é", most=9)


def test_an_idle_expert_costs_little(base: Path, make: Make) -> None:
    reader, delta = SettingsReader(base, text_config(base)), Delta.open(make("a"))
    kept = [reader.read("a", delta)]
    tracemalloc.start()
    try:
        kept += [reader.read("a", delta) for _ in range(20)]
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 20 * 20_000
    finally:
        tracemalloc.stop()


# one tokenizer, many threads


@pytest.fixture
def truncating() -> Tokenizer:
    """A tokenizer whose file asks for truncation and padding, which transformers takes back before it encodes."""
    inner = tokenizer_of()
    inner.backend_tokenizer.enable_truncation(max_length=4)
    inner.backend_tokenizer.enable_padding(length=64)
    return Tokenizer(inner)


def test_encoding_changes_nothing_of_a_fast_tokenizer(truncating: Tokenizer) -> None:
    backend: NativeTokenizer = truncating.inner.backend_tokenizer
    assert backend.truncation is None and backend.padding is None
    failed: list[BaseException] = []
    texts = ["word " * length for length in range(200)]

    def work() -> None:
        try:
            for text in texts:
                assert truncating.decode(truncating.encode(text, most=10**6)) == text
        except BaseException as error:  # also what Rust panics with
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_slow_tokenizer_holds_up_nobody_elses(base: Path, make: Make, tuned: Path) -> None:
    experts = {"a": make("a"), "b": make("b", tokenizer=with_letters_reversed(tuned))}
    began, go_on = threading.Event(), threading.Event()
    with engine_of(base, experts=experts) as engine:
        slow: Any = engine._worker.pool.get("a").settings.required_tokenizer  # type: ignore[union-attr]
        call = slow.inner._encode_plus

        def waits(*args: Any, **kwargs: Any) -> Any:
            began.set()
            assert go_on.wait(60)
            return call(*args, **kwargs)

        slow.inner._encode_plus = waits
        asking = threading.Thread(target=lambda: engine.generate(PROMPT, expert="a", max_new_tokens=1))
        asking.start()
        try:
            assert began.wait(60)
            for prompt, name in ((PROMPT, "b"), ([1, 2], "a"), ([1, 2], "base")):
                assert engine.generate(prompt, expert=name, max_new_tokens=2).text is not None
        finally:
            go_on.set()
            asking.join()


def test_a_text_that_cannot_fit_is_not_encoded(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(base) as engine:
        tokenizer: Any = engine._worker.settings_reader.base.required_tokenizer
        monkeypatch.setattr(tokenizer.inner, "_encode_plus", None)
        with pytest.raises(RequestError, match="less than 256 tokens, found 3000000 characters"):
            engine.generate("word " * 600_000)


# what generation configs ask for


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 7},
        {"max_length": 15},
        {"max_length": 15, "forced_eos_token_id": 257},
        {"max_new_tokens": 9, "forced_eos_token_id": 257},
        {"max_new_tokens": 12, "bad_words_ids": [[0], [1, 2]], "no_repeat_ngram_size": 2},
        {"max_new_tokens": 12, "sequence_bias": [[[3], 5.0]], "suppress_tokens": [3000]},
        {"max_new_tokens": 12, "typical_p": 0.9, "top_k": 3},
    ],
)
def test_generation_settings_are_transformers_own(
    base: Path, make: Make, tmp_path: Path, asked: dict[str, Any]
) -> None:
    expert = make("a", generation_config={"eos_token_id": 257, **asked})
    restore(base, expert, tmp_path / "restored")
    with engine_of(base, experts={"a": expert}) as engine:
        said = engine.generate([1, 2, 3], expert="a").token_ids
    assert said == greedy(tmp_path / "restored", [1, 2, 3])


def test_lengths_of_the_call_come_first(base: Path, make: Make) -> None:
    expert = make("a", generation_config={"eos_token_id": 257, "max_length": 5})
    with engine_of(base, experts={"a": expert}) as engine:
        assert len(engine.generate([1, 2, 3], expert="a").token_ids) == 2
        assert len(engine.generate([1, 2, 3], expert="a", max_new_tokens=4).token_ids) == 4
        with pytest.raises(RequestError, match=r"less than 5 tokens \(max_length of its generation config\), found 5"):
            engine.generate([1, 2, 3, 4, 5], expert="a")


def test_ways_to_decode_that_are_not_done_are_named(base: Path, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    ways = {"num_beams": 4, "guidance_scale": 1.5, "max_time": 3.0, "encoder_repetition_penalty": 2.0}
    expert = make("a", generation_config={"eos_token_id": 257, "num_return_sequences": 1, **ways})
    with caplog.at_level(logging.WARNING, "meswitch"), engine_of(base, experts={"a": expert}) as engine:
        assert len(engine.generate([1, 2, 3], expert="a", max_new_tokens=3).token_ids) == 3
    [record] = [record.getMessage() for record in caplog.records if record.name.startswith("meswitch")]
    assert "expert 'a'" in record and "num_return_sequences" not in record
    assert all(f"{name}={value}" in record for name, value in ways.items())


@pytest.mark.parametrize(
    "asked",
    [
        {"bad_words_ids": [[100000]]},
        {"forced_bos_token_id": 100000},
        {"sequence_bias": [[[999999], -1.0]]},
        {"suppress_tokens": list(range(264))},
        {"repetition_penalty": 1e-46},
        {"repetition_penalty": "high"},
    ],
)
def test_settings_that_no_request_can_run_with_fail_alone(base: Path, make: Make, asked: dict[str, Any]) -> None:
    bad, good = make("a", generation_config={"eos_token_id": 257, **asked}), make("b")
    with engine_of(base, experts={"a": bad, "b": good}) as engine:
        beside = engine.stream([9, 8, 7], expert="b", max_new_tokens=60)
        next(beside)
        for _ in range(2):
            with pytest.raises(RequestError, match=r"generation config|repetition_penalty"):
                engine.generate([5], expert="a", max_new_tokens=12)
        list(beside)
        assert engine.stats()["requests"]["failed"] == 0


@pytest.fixture
def flat(base: Path, make: Make) -> Iterator[Callable[..., set[int]]]:
    """The tokens that 300 draws of a first token give, of an expert that samples."""
    expert = make("a", generation_config={"eos_token_id": 257, "do_sample": True, "temperature": 3.0})
    with engine_of(base, experts={"a": expert}) as engine:
        said = [{"role": "user", "content": "hello"}]

        def draw(**settings: Any) -> set[int]:
            seeds = {"seed": list(range(300)), "max_new_tokens": 1}
            return {answer.token_ids[0] for answer in engine.chat([said] * 300, expert="a", **seeds, **settings)}

        yield draw


def test_where_nobody_says_top_k_it_is_transformers_fifty(flat: Callable[..., set[int]]) -> None:
    assert len(flat(top_k=264)) > 60 < len(flat(top_k=0))
    assert len(flat()) <= 50
    assert len(flat(temperature=1e-40)) == 1
