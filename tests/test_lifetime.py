"""Streams and their readers, bounds on what waits, and how an engine ends."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from families import save_experts
from forks import forked
from meswitch.engine.engine import Engine
from meswitch.errors import (
    EngineClosedError,
    OverloadedError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
)
from meswitch.router import base as router_base
from meswitch.router.protocol import embed_prompts
from meswitch.router.route import Route

PROMPT = "one prompt that is longer than a page of the prefix cache, which holds thirty-two tokens"
LONG = 160  # tokens of an answer that is still being made when something else happens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_experts(tmp_path_factory.mktemp("lifetime"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Engine]:
    with engine_of(folder) as engine:
        yield engine


def engine_of(folder: Path, **settings: Any) -> Engine:
    settings = {"experts": folder / "experts", "kv_budget": "8MiB", "max_batch_tokens": 64, "exact": True, **settings}
    return Engine(folder / "base", **settings)


class Paused:
    """Keeps an engine's thread between two steps while it is entered."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.reached, self.go = engine, threading.Event(), threading.Event()

    def __enter__(self) -> Paused:
        def job() -> None:
            self.reached.set()
            self.go.wait(60)

        self.engine._worker.inbox.post(job)
        assert self.reached.wait(60)
        return self

    def __exit__(self, *args: object) -> None:
        self.go.set()


def slow_down(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take long from now on, so that a long answer is still being made when the test goes on."""
    worker, begin = engine._worker, engine._worker._begin_step

    def slow() -> None:
        begin()
        if not worker.inbox.closed:
            threading.Event().wait(0.05)

    monkeypatch.setattr(worker, "_begin_step", slow)


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """A thread that runs `work`, and what comes of it: what it returned or raised."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def ended(threads: list[tuple[threading.Thread, list[Any]]]) -> list[Any]:
    """What came of the threads, all of which end."""
    for thread, _ in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread, _ in threads)
    return [found[0] for _, found in threads]


# streams


def test_every_reader_of_a_stream_sees_its_end(shared: Engine) -> None:
    expected = shared.generate(PROMPT, expert="a", max_new_tokens=40)
    stream = shared.stream(PROMPT, expert="a", max_new_tokens=40)
    pieces = ended([in_thread(lambda: list(stream)) for _ in range(4)])
    assert sorted("".join(map("".join, pieces))) == sorted(expected.text)
    assert list(stream) == [] and list(stream) == [] and stream.answer == expected


def test_every_reader_of_a_stream_that_fails_gets_an_error_of_its_own(folder: Path) -> None:
    engine = engine_of(folder)
    with Paused(engine):
        stream = engine.stream(PROMPT, expert="a", max_new_tokens=40)
        readers = [in_thread(lambda: list(stream)) for _ in range(3)]
        closing = in_thread(engine.close)
    errors = [*ended([*readers, closing])[:3], *ended([in_thread(lambda: list(stream))])]
    assert all(isinstance(error, EngineClosedError) for error in errors) and len(set(map(id, errors))) == 4
    assert stream.answer is None


def test_a_stream_is_a_context_manager_that_cancels(shared: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shared.stats()["requests"]
    with monkeypatch.context() as patched:
        slow_down(shared, patched)
        with shared.stream(PROMPT, expert="a", max_new_tokens=LONG) as stream:
            next(stream)
        shared._worker.call(lambda: None)
    after = shared.stats()["requests"]
    assert after["cancelled"] == before["cancelled"] + 1 and after["running"] == after["waiting"] == 0
    assert list(stream) == [] and stream.answer is None
    with pytest.raises(RequestCancelledError):
        stream._request.result()
    with shared.stream(PROMPT, expert="a", max_new_tokens=3) as stream:
        text = "".join(stream)
    assert stream.answer is not None and stream.answer.text == text  # stays readable
    assert shared.stats()["requests"]["cancelled"] == after["cancelled"]


def test_closing_a_stream_ends_its_readers(folder: Path) -> None:
    with engine_of(folder) as engine, Paused(engine) as paused:
        stream = engine.stream(PROMPT, expert="a", max_new_tokens=LONG)
        readers = [in_thread(lambda: list(stream)) for _ in range(2)]
        stream.close()
        paused.go.set()
        assert ended(readers) == [[], []]


def test_a_forked_process_reads_what_came_and_waits_for_nothing(shared: Engine) -> None:
    done = shared.stream(PROMPT, expert="a", max_new_tokens=5)
    done._request.result()
    with Paused(shared):
        running = shared.stream(PROMPT, expert="a", max_new_tokens=LONG)

        def work() -> None:
            assert done.answer is not None and "".join(done) == done.answer.text
            for _ in range(2):
                with pytest.raises(EngineClosedError, match="forked"):
                    next(running)
            with pytest.raises(EngineClosedError):
                running._request.result()
            running.close()
            assert list(running) == []
            assert shared.stats()["requests"]["waiting"] == 1
            shared.close(drain=True)

        assert forked(work) == 0
    assert "".join(running) == running.answer.text  # type: ignore[union-attr]


# what waits


def test_more_than_may_wait_is_refused_whole(folder: Path) -> None:
    with engine_of(folder, max_waiting=3) as engine:
        with Paused(engine):
            streams = [engine.stream(PROMPT, expert="a", max_new_tokens=2) for _ in range(2)]
            with pytest.raises(OverloadedError, match=r"at most 3 waiting requests .max_waiting., found 2 and 2 more"):
                engine.generate([PROMPT] * 2, expert="a")
            streams.append(engine.stream(PROMPT, max_new_tokens=2))
            with pytest.raises(OverloadedError):
                engine.chat([{"role": "user", "content": "hello"}])
            assert engine.stats()["requests"]["waiting"] == 3
            assert engine.generate([], expert="a") == []
        for stream in streams:
            list(stream)
        assert engine.generate(PROMPT, max_new_tokens=2).expert == "base"
        counts = engine.stats()["requests"]
        assert counts == {"waiting": 0, "running": 0, "finished": 4, "failed": 0, "cancelled": 0}
        assert engine.experts["a"]["uses"] == 0


def test_a_request_that_is_late_fails_alone(shared: Engine) -> None:
    expected = shared.generate(PROMPT, expert="a", max_new_tokens=20)
    with Paused(shared):
        late = shared.stream(PROMPT, expert="a", max_new_tokens=20, timeout=1e-9)
        other = shared.stream(PROMPT, expert="a", max_new_tokens=20, timeout=3600)
    with pytest.raises(RequestTimeoutError, match="did not end within 1e-09 seconds") as caught:
        list(late)
    assert isinstance(caught.value, TimeoutError)
    assert "".join(other) == expected.text
    with pytest.raises(RequestTimeoutError):
        shared.generate([PROMPT, PROMPT], expert="a", timeout=1e-9)
    for wrong in (0, -1, "1", True, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="timeout: expected seconds"):
            shared.generate(PROMPT, timeout=wrong)


def test_a_request_that_is_late_before_it_waits_does_not_run(shared: Engine) -> None:
    worker = shared._worker
    requests = shared._preparation.requests([PROMPT], "a", {"timeout": 1e-9})
    worker.registry.accept(requests)
    worker.call(lambda: None)
    worker.call(lambda: None)
    assert requests[0].ended
    worker.call(lambda: worker._enqueue(requests))
    assert not worker.queue and shared.experts["a"]["uses"] == 0


def test_running_are_those_in_the_batch(folder: Path) -> None:
    """A step takes four requests here; the others wait, and cost the scheduler nothing."""
    with engine_of(folder, max_batch_tokens=4) as engine:
        seen: list[tuple[int, int, int]] = []
        scheduler = engine._worker.scheduler
        schedule = scheduler.schedule_batch

        def watched(*args: Any) -> Any:
            batch = schedule(*args)
            seen.append((len(scheduler.active_requests), len(scheduler.waiting_requests), len(engine._worker.live)))
            return batch

        scheduler.schedule_batch = watched
        begin, counted = engine._worker._begin_step, []

        def counting() -> None:
            begin()
            counted.append(engine.stats()["requests"])

        engine._worker._begin_step = counting  # type: ignore[method-assign]
        engine.generate([[1, 2]] * 40, expert=["a", "b"] * 20, max_new_tokens=3)
        assert max(active + waiting for active, waiting, _ in seen) <= 4 >= max(live for _, _, live in seen)
        assert max(counts["running"] for counts in counted) == 4
        assert all(counts["running"] + counts["waiting"] + counts["finished"] == 40 for counts in counted)


def test_stats_wait_for_nobody(shared: Engine) -> None:
    with Paused(shared), shared._worker.inbox.lock, shared._worker.registry._lock, shared._worker.pool._lock:
        [stats] = ended([in_thread(shared.stats)])
        assert stats["experts"].keys() == {"a", "b"} and stats["requests"]["running"] == 0


# what runs between steps


def test_steps_go_on_while_an_expert_is_opened(shared: Engine, folder: Path, monkeypatch: Any) -> None:
    opening, go = threading.Event(), threading.Event()
    pool = shared._worker.pool
    open_delta = pool.open_delta

    def slow(path: Path) -> Any:
        opening.set()
        assert go.wait(60)
        return open_delta(path)

    monkeypatch.setattr(pool, "open_delta", slow)
    adding = in_thread(lambda: shared.add_expert("late", folder / "experts" / "a"))
    assert opening.wait(60)
    answer = shared.generate(PROMPT, expert="a", max_new_tokens=5)  # whole, while the opener waits
    go.set()
    assert ended([adding]) == [None]
    assert shared.generate(PROMPT, expert="late", max_new_tokens=5).token_ids == answer.token_ids
    shared.remove_expert("late")


def test_a_step_runs_between_two_batches_of_a_router(folder: Path, monkeypatch: Any) -> None:
    """The router's prompts are read a batch a job, several callers at once, and its arithmetic is on the engine's
    thread."""
    threads: set[str] = set()

    class Router:
        def route(self, prompts: list[str], base: Any) -> list[Route]:
            embeddings = embed_prompts(base, prompts)

            def arithmetic() -> Tensor:
                threads.add(threading.current_thread().name)
                return embeddings.sum(1)

            base.compute(arithmetic)
            return [Route("a", {"a": 1.0}, False) for _ in prompts]

    with engine_of(folder, router=Router()) as engine:
        turns, at = [0], []
        admit, pooled, ids = engine._worker._admit, router_base._pooled_states, router_base._prompt_ids

        def turn() -> None:
            turns[0] += 1
            admit()

        def counted(*args: Any) -> Tensor:
            threads.add(threading.current_thread().name)
            at.append(turns[0])
            return pooled(*args)

        def encoded(*args: Any) -> list[int]:
            assert threading.current_thread().name != "meswitch-engine"
            return ids(*args)

        monkeypatch.setattr(router_base, "_BATCH_TOKENS", 64)
        monkeypatch.setattr(router_base, "_pooled_states", counted)
        monkeypatch.setattr(router_base, "_prompt_ids", encoded)
        monkeypatch.setattr(engine._worker, "_admit", turn)
        callers = [in_thread(lambda: engine.generate([PROMPT] * 8, max_new_tokens=1)) for _ in range(3)]
        assert all(answer.expert == "a" for answers in ended(callers) for answer in answers)
        assert len(at) == 24 == len(set(at))  # a turn for each: whoever runs has a step between two
        assert threads == {"meswitch-engine"}


# the end


def test_close_frees_the_base_and_the_experts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder)
    worker = engine._worker
    slow_down(engine, monkeypatch)
    stream = engine.stream(PROMPT, expert="a", max_new_tokens=LONG)
    next(stream)
    kept = [worker.model, worker.layers, worker.batch._cache, worker.pool.get("a").delta]
    engine.remove_expert("a")
    alive = [weakref.ref(one) for one in kept]
    del kept
    engine.close()
    with pytest.raises(EngineClosedError) as caught:
        list(stream)
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4
    assert engine.experts == {} and engine.stats()["requests"]["failed"] == 1
    assert caught.value.__traceback__ is not None and engine is not None


def test_close_can_answer_what_was_accepted(folder: Path) -> None:
    engine = engine_of(folder)
    expected = engine.generate(PROMPT, expert="a", max_new_tokens=20)
    with Paused(engine):
        streams = [engine.stream(PROMPT, expert="a", max_new_tokens=20) for _ in range(3)]
        dropped = engine.stream(PROMPT, expert="a", max_new_tokens=LONG)
        closing = in_thread(lambda: engine.close(drain=True))
        while engine._worker.inbox.accepting:
            closing[0].join(0.001)
        for call in (
            lambda: engine.generate(PROMPT),
            lambda: engine.add_expert("x", folder / "experts" / "a"),
            lambda: engine.remove_expert("a"),
        ):
            with pytest.raises(EngineClosedError):
                call()
        dropped.close()
    ended([closing])
    assert ["".join(stream) for stream in streams] == [expected.text] * 3
    assert engine.stats()["requests"] == {"waiting": 0, "running": 0, "finished": 4, "failed": 0, "cancelled": 1}


def test_a_drain_has_a_limit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(folder)
    slow_down(engine, monkeypatch)
    stream = engine.stream(PROMPT, expert="a", max_new_tokens=LONG)
    next(stream)
    engine.close(drain=True, timeout=0.01)
    with pytest.raises(EngineClosedError):
        list(stream)


def test_callers_of_an_engine_that_closes_meanwhile_hear_nothing_else(folder: Path, monkeypatch: Any) -> None:
    """Whatever is under way on a caller's thread when the engine is closed."""
    for place in ("encode", "limit", "stops"):
        engine = engine_of(folder)
        work = getattr(engine._preparation._encoder, place)

        def closing(*args: Any, engine: Engine = engine, work: Any = work, **kwargs: Any) -> Any:
            engine.close()
            return work(*args, **kwargs)

        monkeypatch.setattr(engine._preparation._encoder, place, closing)
        with pytest.raises(EngineClosedError, match=r"^the engine is closed"):
            engine.generate([PROMPT, PROMPT], expert="a", temperature=0.5)
    engine = engine_of(folder)
    open_delta = engine._worker.pool.open_delta

    def opened(path: Path) -> Any:
        engine.close()
        return open_delta(path)

    monkeypatch.setattr(engine._worker.pool, "open_delta", opened)
    with pytest.raises(EngineClosedError):
        engine.add_expert("x", folder / "experts" / "a")


def test_close_under_load(folder: Path) -> None:
    engine = engine_of(folder)

    def ask() -> None:
        while True:
            engine.generate([PROMPT], expert="a", max_new_tokens=1)

    asking = [in_thread(ask) for _ in range(6)]
    watching = in_thread(lambda: [engine.stats() for _ in range(200)])
    while engine.stats()["requests"]["finished"] < 12:
        assert all(thread.is_alive() for thread, _ in asking)
    engine.close()
    assert all(type(error) is EngineClosedError for error in ended(asking))
    assert len(ended([watching])[0]) == 200
    counts = engine.stats()["requests"]
    assert counts["running"] == counts["waiting"] == 0 and counts["finished"] >= 12


def test_a_budget_that_nothing_honours_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="device_budget"):
        Engine(folder / "base", device_budget="1GiB")
    with pytest.raises(RequestError, match="max_waiting"):
        Engine(folder / "base", max_waiting=0)
