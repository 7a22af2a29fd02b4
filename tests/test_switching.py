"""An engine with more experts than memory: loads, evictions, priorities, traces, and a folder that is watched."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from families import config_of, save_finetune, save_random
from meswitch import Delta, Engine, compress
from meswitch.engine import admission, worker
from meswitch.errors import BudgetError, ChecksumError, ExpertNotFoundError, FormatError, RequestError
from meswitch.experts.watch import FolderWatch

PROMPT = [1, 2, 3, 4]
NAMES = "abcd"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and four experts of it."""
    folder = tmp_path_factory.mktemp("switching")
    base = save_random(folder / "base", config_of("llama"))
    for seed, name in enumerate(NAMES):
        tuned = save_finetune(folder / f"tuned-{name}", base, seed=seed + 1)
        compress(base, tuned, folder / "experts" / name)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the experts, to be changed."""
    shutil.copytree(made / "experts", tmp_path / "experts")
    return tmp_path / "experts"


def engine_of(made: Path, experts: Any = None, **settings: Any) -> Engine:
    settings = {"kv_budget": "8MiB", "max_batch_tokens": 64, "dtype": "float32", **settings}
    return Engine(made / "base", experts=made / "experts" if experts is None else experts, **settings)


@pytest.fixture(scope="module")
def alone(made: Path) -> dict[str, list[int]]:
    """What each expert answers when it is served alone."""
    answers = {}
    for name in NAMES:
        with engine_of(made, {name: made / "experts" / name}) as engine:
            answers[name] = engine.generate(PROMPT, expert=name, max_new_tokens=12).token_ids
    return answers


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def resident(engine: Engine) -> set[str]:
    return {name for name, expert in engine.experts.items() if expert["residency"] == "host"}


@pytest.fixture
def engine(made: Path) -> Iterator[Engine]:
    """One with room for two of four experts."""
    with engine_of(made) as probe:
        room = 2 * max(expert["bytes"] for expert in probe.experts.values())
    with engine_of(made, host_budget=room) as engine:
        yield engine


def test_more_experts_than_memory(engine: Engine, alone: dict[str, list[int]]) -> None:
    names = list(NAMES) * 5
    answers = engine.generate([PROMPT] * len(names), expert=names, max_new_tokens=12)
    assert [answer.token_ids for answer in answers] == [alone[name] for name in names]
    stats = engine.stats()
    host = stats["host"]
    assert host["bytes"] <= host["budget"] and host["hits"] + host["misses"] == 20
    assert host["loads"] == 4 and host["evictions"] == 2  # grouped: each was loaded once
    assert len(resident(engine)) == 2
    of_a = stats["experts"]["a"]
    assert (of_a["requests"], of_a["tokens"], of_a["loads"]) == (5, 60, 1)
    assert of_a["load_ms"]["p50"] > 0 and of_a["queue_ms"]["p99"] > 0 and of_a["first_token_ms"]["p99"] > 0
    assert stats["answered"]["requests"] == 20 and stats["answered"]["tokens_per_second"]["p50"] > 0


def test_nobody_waits_for_an_expert_that_has_no_room(
    engine: Engine, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While two experts fill the budget, a third is waited for, and the base and the two go on."""
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 1e6)
    streams = [engine.stream(PROMPT, expert=name, max_new_tokens=200) for name in "ab"]
    for stream in streams:
        next(stream)
    third = engine.stream(PROMPT, expert="c", max_new_tokens=12)
    assert engine.generate(PROMPT, expert="base", max_new_tokens=2).expert == "base"
    assert engine.generate(PROMPT, expert="a", max_new_tokens=12).token_ids == alone["a"]
    assert engine.stats()["requests"]["waiting"] == 1 and engine.experts["c"]["residency"] == "disk"
    streams[0].close()
    list(third)
    assert third.answer is not None and third.answer.token_ids == alone["c"]
    assert resident(engine) == {"b", "c"}
    streams[1].close()


def test_prefetch_and_pin(engine: Engine) -> None:
    engine.prefetch("c")
    until(lambda: resident(engine) == {"c"})
    engine.generate(PROMPT, expert="c", max_new_tokens=1)
    assert engine.experts["c"]["hits"] == 1
    engine.pin("c")
    for name in "abd":
        engine.generate(PROMPT, expert=name, max_new_tokens=1)
    assert "c" in resident(engine) and engine.experts["c"]["pinned"]
    engine.pin("a")
    with pytest.raises(BudgetError, match="pinned experts would need"):
        engine.pin("b")
    engine.unpin("c")
    engine.generate(PROMPT, expert="b", max_new_tokens=1)
    until(lambda: resident(engine) == {"a", "b"})
    for call in (engine.prefetch, engine.pin, engine.unpin):
        with pytest.raises(ExpertNotFoundError):
            call("zzz")


def test_the_budget_changes_while_it_runs(engine: Engine, alone: dict[str, list[int]]) -> None:
    one = engine.experts["a"]["bytes"]
    engine.generate([PROMPT] * 2, expert=["a", "b"], max_new_tokens=1)
    engine.set_host_budget(one)
    until(lambda: engine.stats()["host"]["bytes"] <= one)
    names = ["c", "a", "c", "d"]
    answers = engine.generate([PROMPT] * 4, expert=names, max_new_tokens=12)
    assert [answer.token_ids for answer in answers] == [alone[name] for name in names]
    engine.set_host_budget(one // 2)
    with pytest.raises(BudgetError, match=f"{one // 2}"):
        engine.generate(PROMPT, expert="a")
    engine.set_host_budget("1GiB")
    assert engine.generate(PROMPT, expert="a", max_new_tokens=12).token_ids == alone["a"]
    with pytest.raises(RequestError, match="host_budget"):
        engine.set_host_budget("much")


def test_an_expert_that_breaks_comes_back(made: Path, folder: Path, alone: dict[str, list[int]]) -> None:
    with engine_of(made, folder) as engine:
        file = folder / "a" / "delta.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-100] + bytes(100))
        with pytest.raises(ChecksumError, match="checksum"):
            engine.generate(PROMPT, expert="a")
        assert "ChecksumError" in engine.experts["a"]["error"]
        assert engine.generate(PROMPT, expert="b", max_new_tokens=12).token_ids == alone["b"]
        file.write_bytes(content)
        assert engine.generate(PROMPT, expert="a", max_new_tokens=12).token_ids == alone["a"]
        assert engine.experts["a"]["error"] is None and engine.stats()["host"]["failed_loads"] == 1


def test_a_long_prompt_leaves_running_texts_their_pace(made: Path, monkeypatch: Any) -> None:
    """No step beside a running text takes more of a prompt than the engine says, and both answers are right."""
    long = [1 + number % 200 for number in range(150)]
    with engine_of(made) as engine:
        expected = [engine.generate(prompt, expert="a", max_new_tokens=20).token_ids for prompt in (PROMPT, long)]
    with engine_of(made) as engine:  # without the prompts in its prefix cache
        worker, seen = engine._worker, []
        monkeypatch.setattr(worker.chunk, "learn", lambda *step: seen.append(step))
        worker.chunk.tokens = 10
        first = engine.stream(PROMPT, expert="a", max_new_tokens=60)
        next(first)
        assert engine.generate(long, expert="a", max_new_tokens=20).token_ids == expected[1]
        assert "".join(first) is not None and first.answer is not None
        assert first.answer.token_ids[:20] == expected[0]
    beside = [prompt for decoding, prompt, _ in seen if decoding]
    assert max(beside) == 10 and sum(prompt for _, prompt, _ in seen) == len(PROMPT) + len(long)


def test_priorities(engine: Engine) -> None:
    answer = engine.generate(PROMPT, expert="a", max_new_tokens=2, priority="batch")
    assert answer.expert == "a"
    with pytest.raises(RequestError, match="priority: expected 'interactive' or 'batch', found 'high'"):
        engine.generate(PROMPT, priority="high")


def test_a_trace_says_what_was_asked_for_and_done(made: Path, engine: Engine, tmp_path: Path) -> None:
    budget = engine.stats()["host"]["budget"]
    with engine_of(made, host_budget=budget, trace=tmp_path / "trace.jsonl") as traced:
        for name in "abcab":
            traced.generate(PROMPT, expert=name, max_new_tokens=1)
        traced.remove_expert("c")
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert lines[0] | {"t": 0.0} == {"t": 0.0, "event": "start", "version": 1, "budget": budget, "policy": "lru"}
    events = [(line["event"], line.get("expert")) for line in lines[1:]]
    assert [name for event, name in events if event == "request"] == list("abcab")
    assert events.count(("load", "a")) == 2 and ("evict", "a") in events and ("retire", "c") in events
    assert all(line["bytes"] > 0 for line in lines[1:]) and lines == sorted(lines, key=lambda line: line["t"])


def test_an_expert_of_many_sites_is_put_into_the_layers_between_steps(
    made: Path, alone: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site a step, while another text runs on; one that is removed meanwhile leaves nothing behind."""
    monkeypatch.setattr(worker, "_INSTALL_SECONDS", 0.0)
    with engine_of(made) as engine:
        sites = len(Delta.open(made / "experts" / "a").sites)
        running = engine.stream(PROMPT, expert="base", max_new_tokens=200)
        next(running)
        before = engine.stats()["steps"]
        assert engine.generate(PROMPT, expert="a", max_new_tokens=12).token_ids == alone["a"]
        assert engine.stats()["steps"] - before > sites
        engine.prefetch("b")
        until(lambda: engine._worker.pool.residency.is_installing)
        engine.remove_expert("b")
        until(lambda: not engine._worker.pool.residency.is_installing)
        assert all(wrapper.slots <= {0} for wrapper in engine._worker.layers._wrappers.values())
        until(lambda: engine.stats()["host"]["bytes"] == engine.experts["a"]["bytes"])
        running.close()
        engine.remove_expert("a")
        until(lambda: not engine._worker.layers._wrappers)


def test_a_watched_folder(made: Path, folder: Path, alone: dict[str, list[int]], tmp_path: Path) -> None:
    """What appears is served, what is replaced is switched, what is removed retires; half a copy changes nothing."""
    shutil.move(folder / "d", tmp_path / "d")
    with engine_of(made, folder) as engine:
        watch = FolderWatch(engine._worker.pool, folder)
        engine.add_expert("own", tmp_path / "d")
        watch.look()
        assert set(engine.experts) == {"a", "b", "c", "own"}
        stream = engine.stream(PROMPT, expert="a", max_new_tokens=12)
        pieces = [next(stream)]
        shutil.rmtree(folder / "a")
        shutil.copytree(folder / "b", folder / "a")
        shutil.rmtree(folder / "c")
        shutil.copytree(tmp_path / "d", folder / "late")
        (folder / "half").mkdir()
        (folder / "half" / "meswitch.json").write_text("{")
        (folder / "b" / "meswitch.json").write_text("{")
        watch.look()
        assert set(engine.experts) == {"a", "b", "late", "own"}
        assert engine.generate(PROMPT, expert="a", max_new_tokens=12).token_ids == alone["b"]
        assert engine.generate(PROMPT, expert="late", max_new_tokens=12).token_ids == alone["d"]
        with pytest.raises(ExpertNotFoundError):
            engine.generate(PROMPT, expert="c")
        pieces += stream
        assert stream.answer is not None and stream.answer.token_ids == alone["a"]
        assert engine.generate(PROMPT, expert="b", max_new_tokens=12).token_ids == alone["b"]  # as it was opened
        shutil.rmtree(folder / "half")
        shutil.copytree(tmp_path / "d", folder / "half")
        watch.look()
        assert engine.generate(PROMPT, expert="half", max_new_tokens=12).token_ids == alone["d"]


def test_watching_is_a_setting(made: Path, folder: Path) -> None:
    with engine_of(made, folder, watch=True) as engine:
        shutil.copytree(folder / "a", folder / "late")
        until(lambda: "late" in engine.experts)
        shutil.rmtree(folder / "late")
        until(lambda: "late" not in engine.experts)
    for experts in (None, [folder / "a"], folder / "a"):
        with pytest.raises(RequestError, match="watch: expected a folder of delta directories"):
            Engine(made / "base", experts=experts, watch=True)


def test_a_broken_expert_of_a_folder_is_looked_at_again(made: Path, folder: Path, alone: dict[str, list[int]]) -> None:
    text = (folder / "a" / "meswitch.json").read_text()
    (folder / "a" / "meswitch.json").write_text("{}")
    with engine_of(made, folder) as engine:
        with pytest.raises(FormatError):
            engine.generate(PROMPT, expert="a")
        (folder / "a" / "meswitch.json").write_text(text)
        assert engine.generate(PROMPT, expert="a", max_new_tokens=12).token_ids == alone["a"]
