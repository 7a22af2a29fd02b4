"""Requests through a running engine: text, sampling, streams, experts that come and go, and steps that
fail."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import CHAT_TEMPLATE, config_of, save_finetune, save_random, tokenizer_of
from forks import forked
from meswitch.compression.job import compress
from meswitch.delta.restoration import restore
from meswitch.engine import Answer
from meswitch.engine.engine import Engine
from meswitch.engine.text import TextDecoder
from meswitch.errors import (
    ArchitectureError,
    BackendError,
    BaseMismatchError,
    BudgetError,
    CheckpointError,
    CudaUnavailableError,
    ExpertNotFoundError,
    FormatError,
    MeswitchError,
    RequestError,
    RouterError,
)
from meswitch.experts.tokenizers import Tokenizer
from meswitch.huggingface.config import context_limit
from meswitch.router.routers import train_router

PROMPT = "one prompt that is longer than a page of the prefix cache, which holds thirty-two tokens"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned-a, tuned-b, experts/{a,b}, restored/{a,b}"""
    folder = tmp_path_factory.mktemp("family")
    base = save_random(folder / "base", config_of("llama"))
    for seed, name in enumerate("ab", 1):
        tuned = save_finetune(folder / f"tuned-{name}", base, seed)
        (tuned / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": 257, "do_sample": name == "b"}))
        compress(base, tuned, folder / "experts" / name)
        restore(base, folder / "experts" / name, folder / "restored" / name)
    return folder


@pytest.fixture(scope="module")
def shared(family: Path) -> Iterator[Engine]:
    with Engine(
        family / "base", experts=family / "experts", kv_budget="8MiB", max_batch_tokens=64, exact=True
    ) as engine:
        yield engine


def small(family: Path, **settings: Any) -> Engine:
    settings = {"kv_budget": "8MiB", "max_batch_tokens": 64, "exact": True, **settings}
    return Engine(family / "base", **settings)


# text


def test_one_prompt_or_a_list(shared: Engine) -> None:
    one = shared.generate(PROMPT, expert="a", max_new_tokens=5)
    assert isinstance(one, Answer) and one.expert == "a" and one.route is None
    assert one.finish_reason == "length" and len(one.token_ids) == 5 and one.prompt_tokens == len(PROMPT)
    many = shared.generate([PROMPT, PROMPT], expert=["a", "base"], max_new_tokens=5)
    assert many[0] == one and many[1].expert == "base"
    assert shared.generate([], expert="a") == []


def test_the_same_prompt_to_two_experts_shares_no_prefix(shared: Engine, family: Path) -> None:
    names = ["a", "b", "base", "a", "b", "base"]
    answers = [shared.generate(PROMPT, expert=name, max_new_tokens=6) for name in names]
    assert answers[:3] == answers[3:]
    tokenizer = tokenizer_of()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    for name, answer in zip(names[:3], answers[:3], strict=True):
        model = AutoModelForCausalLM.from_pretrained(family / ("base" if name == "base" else f"restored/{name}"))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert answer.token_ids == out[0, ids.shape[1] :].tolist()


def test_a_prefix_is_shared_within_an_expert(family: Path) -> None:
    with small(family, experts=family / "experts") as engine:
        engine.generate(PROMPT, expert="a", max_new_tokens=2)
        first = engine.stats()["step_tokens"]
        engine.generate(PROMPT, expert="a", max_new_tokens=2)
        again = engine.stats()["step_tokens"] - first
        engine.generate(PROMPT, expert="b", max_new_tokens=2)
        other = engine.stats()["step_tokens"] - first - again
    assert other == first and again == first - 64  # two whole pages of 32


def test_stop_strings(shared: Engine) -> None:
    whole = shared.generate(PROMPT, expert="a", max_new_tokens=12).text
    stop = whole[4:7]
    answer = shared.generate(PROMPT, expert="a", max_new_tokens=12, stop=["never", stop])
    assert answer.text == whole[: whole.find(stop)] and answer.finish_reason == "stop"
    assert len(answer.token_ids) < 12
    assert shared.generate(PROMPT, expert="a", max_new_tokens=12, stop="never").text == whole


def test_a_special_token_as_stop_string_ends_a_request(shared: Engine) -> None:
    drawn: dict[str, Any] = {"expert": "a", "temperature": 5.0, "max_new_tokens": 100}
    for seed in range(400):
        ids = shared.generate([1], seed=seed, **drawn).token_ids
        if 261 in ids[:60] and len(ids) == 100:
            break
    answer = shared.generate([1], seed=seed, stop="<a>", **drawn)
    assert answer.token_ids == ids[: ids.index(261) + 1] and answer.finish_reason == "stop"


@pytest.mark.parametrize("stops", [(), ("lo w", "zzz"), ("é",), ("🙂!",), ("wörld",)])
def test_text_tail_never_emits_half_of_anything(stops: tuple[str, ...]) -> None:
    tokenizer, text = tokenizer_of(), "héllo wörld 🙂🙂! é"
    decoder, pieces = TextDecoder(Tokenizer(tokenizer), stops), []
    ends = [text.find(stop) for stop in stops if stop in text]
    expected = text[: min(ends, default=len(text))]
    for token in tokenizer(text)["input_ids"]:
        if not decoder.stopped:
            pieces.append(decoder.add(token))
            assert expected.startswith("".join(pieces))
    pieces.append(decoder.finish())
    assert "".join(pieces) == expected


def test_stream_equals_generate(shared: Engine) -> None:
    for name in ("a", "base"):
        whole = shared.generate(PROMPT, expert=name, max_new_tokens=20, stop="never there")
        stream = shared.stream(PROMPT, expert=name, max_new_tokens=20, stop="never there")
        assert "".join(stream) == whole.text and stream.answer == whole and stream.expert == name
        assert list(stream) == []


def test_a_stream_can_be_closed(shared: Engine) -> None:
    stream = shared.stream(PROMPT, expert="a", max_new_tokens=100)
    next(stream)
    stream.close()
    shared._worker.call(lambda: None)
    assert stream._request.ended
    assert list(stream) == [] and shared.stats()["requests"]["running"] == 0


def test_chat_uses_the_experts_own_template_and_settings(shared: Engine) -> None:
    said = [{"role": "user", "content": "hello"}]
    answer = shared.chat(said, expert="a", max_new_tokens=4)
    prompt = tokenizer_of()("<user>hello<assistant>")["input_ids"]
    assert answer == shared.generate(prompt, expert="a", max_new_tokens=4)
    assert "".join(shared.chat(said, expert="a", max_new_tokens=4, stream=True)) == answer.text
    drawn = {shared.chat(said, expert="b", max_new_tokens=4, seed=seed).text for seed in range(5)}
    assert len(drawn) > 1  # its generation_config says do_sample
    greedy = {shared.chat(said, expert="b", max_new_tokens=4, temperature=0, seed=seed).text for seed in range(3)}
    assert len(greedy) == 1
    both = shared.chat([said, said], expert=["a", "b"], max_new_tokens=4, temperature=0)
    assert both[0].text == shared.chat(said, expert="a", max_new_tokens=4, temperature=0).text
    assert [one.expert for one in both] == ["a", "b"]
    with pytest.raises(RequestError, match="stream: expected one conversation, found 2"):
        shared.chat([said, said], expert="a", stream=True)
    with pytest.raises(RequestError, match="the base has no chat template"):
        shared.chat(said, expert="base")
    with pytest.raises(RequestError, match="expected messages"):
        shared.chat([{"content": "hello"}], expert="a")


# sampling


def test_a_seed_gives_the_same_text_whoever_else_is_there(shared: Engine) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.5, "top_p": 0.95}
    alone = shared.generate(PROMPT, expert="a", seed=7, **settings)
    crowd = shared.generate(
        [PROMPT, "other", PROMPT, PROMPT], expert=["b", "base", "a", "a"], seed=[1, 2, 7, 8], **settings
    )
    assert crowd[2] == alone and crowd[3] != alone


def test_a_greedy_request_beside_sampled_ones_stays_greedy(shared: Engine) -> None:
    greedy = shared.generate(PROMPT, expert="a", max_new_tokens=8)
    sampled = [shared.stream(PROMPT, expert="b", max_new_tokens=30, temperature=1.0) for _ in range(2)]
    assert shared.generate(PROMPT, expert="a", max_new_tokens=8, temperature=0.0) == greedy
    for stream in sampled:
        stream.close()


def test_sampling_follows_transformers(shared: Engine, family: Path) -> None:
    """With one token left by top_k, and with a repetition penalty, the text is transformers' own."""
    assert (
        shared.generate(PROMPT, expert="a", max_new_tokens=8, top_k=1).token_ids
        == shared.generate(PROMPT, expert="a", max_new_tokens=8).token_ids
    )
    model = AutoModelForCausalLM.from_pretrained(family / "restored/a")
    ids = torch.tensor([tokenizer_of()(PROMPT)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, repetition_penalty=1.5
    )
    answer = shared.generate(PROMPT, expert="a", max_new_tokens=8, repetition_penalty=1.5)
    assert answer.token_ids == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_new_tokens": value} for value in (0, -1, 1.5, True, "3")),
        *({"temperature": value} for value in (-0.1, float("nan"), float("inf"), "hot", True)),
        *({"top_p": value} for value in (0, 1.1, -1)),
        *({"top_k": value} for value in (-1, 2.0)),
        *({"min_p": value} for value in (-0.1, 2)),
        *({"repetition_penalty": value} for value in (0, 1e-46, 1e300)),
        *({"temperature": 10**400}, {"seed": -1}, {"seed": "x"}, {"seed": [1, 2]}),
        *({"stop": value} for value in ("", [3], 5, b"x", "\ud83d")),
        *({"colour": "red"}, {"expert": ["a", "b"]}),
    ],
)
def test_bad_numbers(shared: Engine, wrong: dict[str, Any]) -> None:
    [name] = wrong
    with pytest.raises(RequestError, match=name):
        shared.generate(PROMPT, **wrong)


# what cannot run


def test_unknown_expert_is_never_the_base(shared: Engine) -> None:
    with pytest.raises(ExpertNotFoundError, match=r"(?s)'aa'.*'a'"):
        shared.generate([PROMPT, PROMPT], expert=["a", "aa"])
    with pytest.raises(ExpertNotFoundError):
        shared.stream(PROMPT, expert="aa")
    shared._worker.call(lambda: None)  # what was held is given back between steps
    assert all(expert["uses"] == 0 for expert in shared.experts.values())


def test_prompts_that_cannot_run(shared: Engine, family: Path) -> None:
    with pytest.raises(RequestError, match=r"less than 256 tokens.*found 300"):
        shared.generate([1] * 300)
    with pytest.raises(RequestError, match=r"from 0 to 263, found 264"):
        shared.generate([264])
    with pytest.raises(RouterError, match="router"):
        shared.generate(PROMPT, expert="auto")
    with small(family, kv_budget=80_000, max_batch_tokens=16) as engine:
        tokens = engine.stats()["kv"]["tokens"]
        assert tokens < 256 and engine.stats()["kv"]["bytes"] <= 80_000
        with pytest.raises(RequestError, match=rf"less than {tokens} tokens.*kv_budget"):
            engine.generate([1] * tokens)
        assert engine.generate([1] * (tokens - 3), max_new_tokens=50).finish_reason == "length"


def test_an_empty_prompt_is_the_beginning_of_a_sequence(shared: Engine) -> None:
    assert shared.generate("", max_new_tokens=3) == shared.generate([256], max_new_tokens=3)


def test_a_long_prompt_is_split_and_answers_end_at_the_context(shared: Engine) -> None:
    answer = shared.generate([3] * 250, expert="a", max_new_tokens=50)
    assert len(answer.token_ids) <= 6


def test_settings_that_cannot_be(family: Path) -> None:
    with pytest.raises(CudaUnavailableError):
        Engine(family / "base", device="cuda")
    for wrong in ({"device": "gpu"}, {"dtype": "bf16"}, {"dtype": "int8"}, {"dtype": 16}):
        with pytest.raises(BackendError):
            small(family, **wrong)
    with pytest.raises(BudgetError, match="kv_budget"):
        small(family, kv_budget=1000)
    with pytest.raises(BudgetError, match="host_budget"):
        small(family, experts={"a": family / "experts/a"}, host_budget=1000)
    with pytest.raises(RequestError, match="host_budget"):
        small(family, host_budget="lots")


def test_rope_that_depends_on_the_longest_request() -> None:
    scaled = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "rope_theta": 10000.0,
    }
    config = config_of("phi3", rope_parameters=scaled, original_max_position_embeddings=64)
    limit, why = context_limit(config)
    assert limit == 64 and "longrope" in why
    assert context_limit(config_of("llama"))[0] == 256


# experts that come and go


def test_broken_experts_beside_good_ones(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "experts", tmp_path / "experts")
    (tmp_path / "experts/empty").mkdir()
    other = save_random(tmp_path / "base", config_of("llama"), seed=9)
    compress(other, save_finetune(tmp_path / "tuned", other, 1), tmp_path / "experts/foreign")
    edited = tmp_path / "edited"
    shutil.copytree(family / "tuned-a", edited)
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    compress(family / "base", edited, tmp_path / "experts/edited")
    with small(family, experts=tmp_path / "experts") as engine:
        broken = {name: type_ for name, type_ in engine.experts.items() if type_["error"]}
        assert broken.keys() == {"empty", "foreign", "edited"}
        for name, error in (
            ("empty", FormatError),
            ("foreign", BaseMismatchError),
            ("edited", ArchitectureError),
        ):
            with pytest.raises((error, FileNotFoundError)):
                engine.generate(PROMPT, expert=name)
        assert engine.generate(PROMPT, expert="a", max_new_tokens=2).expert == "a"


def test_add_replace_and_remove_while_in_flight(family: Path) -> None:
    with small(family) as engine:
        with pytest.raises(ExpertNotFoundError):
            engine.generate(PROMPT, expert="x")
        engine.add_expert("x", family / "experts/a")
        old = engine.generate(PROMPT, expert="x", max_new_tokens=60)
        stream = engine.stream(PROMPT, expert="x", max_new_tokens=60)
        pieces = [next(stream)]
        engine.add_expert("x", family / "experts/b")
        new = engine.generate(PROMPT, expert="x", max_new_tokens=60)
        assert "".join(pieces + list(stream)) == old.text != new.text
        stream = engine.stream(PROMPT, expert="x", max_new_tokens=60)
        engine.remove_expert("x")
        with pytest.raises(ExpertNotFoundError):
            engine.generate(PROMPT, expert="x")
        assert "".join(stream) == new.text
        assert engine.experts == {}
        deadline = time.monotonic() + 30
        while engine.stats()["host"]["bytes"]:  # given back after the next turn of the engine's thread
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert not engine._worker.layers._wrappers
        with pytest.raises(ExpertNotFoundError):
            engine.remove_expert("x")


def test_more_experts_than_the_budget_holds(family: Path, shared: Engine) -> None:
    names = ["a", "b", "base", "a", "b"]
    expected = shared.generate([PROMPT] * 5, expert=names, max_new_tokens=6)
    room = max(expert["bytes"] for expert in shared.experts.values())
    with small(family, experts=family / "experts", host_budget=room) as engine:
        assert engine.generate([PROMPT] * 5, expert=names, max_new_tokens=6) == expected
        host = engine.stats()["host"]
        assert host["bytes"] <= room and host["evictions"] >= 1


def test_the_kv_cache_running_out_delays_and_changes_nothing(family: Path, shared: Engine) -> None:
    prompts = [PROMPT[: 40 + 7 * i] for i in range(6)]
    names = ["a", "b", "base"] * 2
    expected = shared.generate(prompts, expert=names, max_new_tokens=40)
    with small(family, experts=family / "experts", kv_budget=100_000, max_batch_tokens=32) as engine:
        assert engine.stats()["kv"]["tokens"] < sum(map(len, prompts)) + 6 * 40
        assert engine.generate(prompts, expert=names, max_new_tokens=40) == expected


def test_router_chooses_or_abstains(family: Path) -> None:
    class Router:
        def route(self, prompts: list[str], embed: Any) -> list[Any]:
            return [SimpleNamespace(expert="b", abstained=prompt.startswith("?"), scores={}) for prompt in prompts]

    with small(family, experts=family / "experts", router=Router()) as engine:
        said, asked, named = engine.generate(["hello", "?", "x"], expert=["auto", "auto", "a"], max_new_tokens=2)
        assert (said.expert, asked.expert, named.expert) == ("b", "base", "a")
        assert said.route.expert == "b" and asked.route.abstained and named.route is None
        assert engine.generate("hello", max_new_tokens=2).expert == "b"
        blank = engine.generate(["", "hello"], max_new_tokens=2)
        assert [one.expert for one in blank] == ["base", "b"] and blank[0].route is None
        engine.remove_expert("b")
        with pytest.raises(ExpertNotFoundError, match=r"the router sends a prompt to .*: 'b'"):
            engine.generate(["?", "hello"], expert="auto")
        assert engine.generate(["?", "x"], expert=["auto", "a"], max_new_tokens=2)[1].expert == "a"


def test_a_trained_router(family: Path, tmp_path: Path) -> None:
    lines = [{"prompt": f"{n} + {n + 3} = {2 * n + 3}", "expert": "a"} for n in range(100, 140)]
    lines += [{"prompt": f"the {word} was read aloud", "expert": "b"} for word in dir(str)[:40]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train_router(family / "base", tmp_path / "data.jsonl", tmp_path / "router")
    with small(family, experts=family / "experts", router=tmp_path / "router") as engine:
        prompts = ["321 + 324 = 645", "the story was read aloud"]
        answers = engine.generate(prompts, expert="auto", max_new_tokens=2)
    for answer, expected in zip(answers, "ab", strict=True):
        assert answer.expert == ("base" if answer.route.abstained else expected)
        assert max(answer.route.scores, key=answer.route.scores.get) == expected


def test_token_ids_need_no_tokenizer(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "base", tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*"))
    with Engine(tmp_path / "base", max_batch_tokens=64) as engine:
        answer = engine.generate([1, 2, 3], max_new_tokens=3)
        assert len(answer.token_ids) == 3 and answer.text == ""
        with pytest.raises(RequestError, match="no tokenizer"):
            engine.generate("text")


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32, None])
def test_the_kernels_of_every_day(family: Path, dtype: Any) -> None:
    """Without `exact`, in the dtypes that checkpoints have: the same text whether alone or together."""
    with small(family, experts=family / "experts", exact=False, dtype=dtype) as engine:
        names = ["a", "base", "b"]
        together = engine.generate([PROMPT] * 3, expert=names, max_new_tokens=4)
        assert [answer.expert for answer in together] == names
        assert all(len(answer.token_ids) == 4 for answer in together)


# steps that fail, ends


def test_a_failing_step_fails_its_requests_alone(family: Path) -> None:
    with small(family, experts=family / "experts") as engine:
        expected = engine.generate(PROMPT, expert="a", max_new_tokens=5)
        forward = engine._worker.model.forward

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of luck")

        engine._worker.model.forward = broken
        with pytest.raises(MeswitchError, match="a step failed: RuntimeError: out of luck") as caught:
            engine.generate(PROMPT, expert="a", max_new_tokens=5)
        assert isinstance(caught.value.__cause__, RuntimeError)
        engine._worker.model.forward = forward
        assert engine.generate(PROMPT, expert="a", max_new_tokens=5) == expected
        assert engine.stats()["requests"]["failed"] == 1 and engine.experts["a"]["uses"] == 0


def test_an_engine_thread_that_ends_tells_everyone(family: Path) -> None:
    engine = small(family)
    engine._worker._admit = lambda: sys.exit(3)  # type: ignore[method-assign]
    with pytest.raises(MeswitchError, match="thread ended: SystemExit"):
        engine.generate(PROMPT)
    with pytest.raises(MeswitchError, match="closed"):
        engine.generate(PROMPT)
    engine.close()


def test_an_engine_that_cannot_start_leaves_no_thread(family: Path, tmp_path: Path) -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "meswitch-engine"}
    with pytest.raises(FileNotFoundError):
        small(family, experts=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Engine(tmp_path)
    shutil.copytree(family / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}, tmp_path / "base/model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        Engine(tmp_path / "base")
    (tmp_path / "base/model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        Engine(tmp_path / "base")
    assert before == {thread for thread in threading.enumerate() if thread.name == "meswitch-engine"}


def test_many_threads(shared: Engine) -> None:
    names = ["a", "b", "base"]
    expected = shared.generate([PROMPT] * 3, expert=names, max_new_tokens=5)
    found: list[Any] = [None] * 9

    def ask(i: int) -> None:
        found[i] = shared.generate(PROMPT, expert=names[i % 3], max_new_tokens=5)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected * 3


def test_close_fails_what_is_in_flight_and_what_comes_after(family: Path) -> None:
    engine = small(family, experts=family / "experts")
    stream = engine.stream(PROMPT, expert="a", max_new_tokens=150)
    next(stream)
    engine.close()
    assert not engine._worker.is_alive()
    with pytest.raises(MeswitchError, match="closed"):
        list(stream)
    with pytest.raises(MeswitchError, match="closed"):
        engine.generate(PROMPT)
    with pytest.raises(MeswitchError, match="closed"):
        engine.add_expert("x", family / "experts/a")
    engine.close()


def test_an_engine_that_nobody_holds_ends_its_thread(family: Path) -> None:
    engine = small(family)
    worker = engine._worker
    del engine
    gc.collect()
    worker.join(10)
    assert not worker.is_alive()


def test_a_forked_process_is_told_that_the_engine_is_not_its_own(shared: Engine) -> None:
    def work() -> None:
        with pytest.raises(MeswitchError, match="forked"):
            shared.generate(PROMPT, expert="a", max_new_tokens=1)

    assert forked(work) == 0
    assert shared.generate(PROMPT, expert="a", max_new_tokens=1).finish_reason == "length"


def test_the_interpreter_ends_with_an_engine_still_open(family: Path) -> None:
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from meswitch.engine import Engine\n"
        "engine = Engine(sys.argv[1], kv_budget='8MiB', max_batch_tokens=64)\n"
        "stream = engine.stream([1, 2, 3], max_new_tokens=200)\n"
        "next(iter([0])); print('done')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(family / "base")], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0 and run.stdout.strip() == "done", run.stderr
