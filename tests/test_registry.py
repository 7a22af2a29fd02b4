"""Counts and order of requests that are accepted, wait, run and end."""

from __future__ import annotations

import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meswitch.engine.admission import AdmissionQueue
from meswitch.engine.inbox import Inbox
from meswitch.engine.registry import Registry
from meswitch.engine.request import Deadline, Request
from meswitch.errors import EngineClosedError, MeswitchError, OverloadedError, RequestTimeoutError
from operations import operations


def request_of(expert: Any = None, deadline: float | None = None) -> Request:
    """One that needs no model."""
    decoder: Any = SimpleNamespace(add=str, finish=lambda: "", stopped=False)
    state: Any = None
    request = Request([1], expert, state, 10, set(), decoder)
    request.deadline = None if deadline is None else Deadline(deadline, deadline)
    return request


# the registry


@given(st.integers(0, 2**32))
def test_every_request_is_counted_once(seed: int) -> None:
    chance, registry = random.Random(seed), Registry()
    requests: list[Request] = []
    for _ in range(60):
        act = chance.choice(("accept", "start", "finish", "fail", "cancel"))
        if act == "accept" or not requests:
            requests += (new := [request_of() for _ in range(chance.randrange(3))])
            registry.accept(new)
            continue
        request = chance.choice(requests)
        if act == "start" and request in registry:
            registry.start(request)
        elif act == "finish":
            request.accept(5)
            registry.finish(request, request.complete())
        elif act == "fail":
            registry.fail(request, ValueError("wrong"))
        elif act == "cancel":
            registry.cancel(request)
        counts, open_ = registry.counts, [one for one in requests if not one.ended]
        assert counts.accepted == len(requests) and len(registry) == len(open_) == counts.running + counts.waiting
        assert counts.finished == sum(one.answer is not None for one in requests)
        assert counts.failed == sum(isinstance(one.error, ValueError) for one in requests)
    registry.fail_all(ValueError("the end"))
    assert all(one.ended for one in requests) and registry.counts.waiting == registry.counts.running == 0


def test_an_error_is_copied_for_every_request() -> None:
    registry, requests = Registry(), [request_of() for _ in range(3)]
    registry.accept(requests)
    try:
        raise MeswitchError("wrong", hint="nothing") from OSError(3, "no such thing")
    except MeswitchError as error:
        registry.fail_all(error)
    errors = []
    for request in [*requests, *requests]:
        with pytest.raises(MeswitchError, match="wrong") as caught:
            request.result()
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 6
    for error in errors:
        assert error.hint == "nothing" and isinstance(error.__cause__, OSError)
        assert error.__cause__.errno == 3 and error.__cause__.__traceback__ is None
        assert error.__context__ is None


def test_no_more_wait_than_may() -> None:
    registry = Registry(max_waiting=2)
    first = [request_of(), request_of()]
    registry.accept(first)
    with pytest.raises(OverloadedError, match=r"at most 2.*found 2 and 1 more"):
        registry.accept([request_of()])
    registry.start(first[0])
    registry.accept([request_of()])
    with pytest.raises(OverloadedError):
        registry.check_room(1)
    registry.cancel(first[1])
    registry.check_room(1)
    assert registry.counts.accepted == 3


def test_those_that_are_late() -> None:
    registry = Registry()
    early, late, none = request_of(deadline=1.0), request_of(deadline=2.0), request_of()
    registry.accept([late, none, early])
    assert registry.expired(0.5) == []
    assert [request for request, _ in registry.expired(1.5)] == [early]
    registry.cancel(late)
    assert registry.expired(9.0) == []
    many = [request_of(deadline=1e9) for _ in range(1000)]
    registry.accept(many)
    for request in many:
        registry.cancel(request)
        registry.expired(time.monotonic())
    assert len(registry._deadlines) <= 70  # of requests that have ended, few are kept


def test_a_late_request_says_after_what_time() -> None:
    registry = Registry()
    registry.accept([request_of(deadline=0.25)])
    [(_, error)] = registry.expired(1.0)
    assert isinstance(error, RequestTimeoutError) and "within 0.25 seconds" in str(error)


# the queue


def drain(queue: AdmissionQueue, full: set[str]) -> list[str]:
    """One turn's admission, where the experts of `full` have no room; who got in."""
    admitted = []
    queue.retry()
    while (request := queue.take()) is not None:
        if request.expert is not None and request.expert.name in full:
            queue.block(request)
        else:
            admitted.append(request.id)
    return admitted


def test_the_order_of_admission() -> None:
    a, b = (SimpleNamespace(name=name) for name in "ab")
    queue = AdmissionQueue()
    one, two, three, four = (request_of(expert) for expert in (a, None, b, a))
    queue.add([one, two, three, four])
    assert drain(queue, {"a"}) == [two.id]  # only the base's pass
    later = request_of()
    queue.add([later, five := request_of(b)])
    assert drain(queue, {"a"}) == [later.id] and len(queue) == 4
    queue.discard(three)
    assert drain(queue, {"b"}) == [one.id, four.id] and len(queue) == 1
    assert drain(queue, set()) == [five.id] and not queue


def test_who_waits_costs_nothing() -> None:
    """A turn with many waiting, and dropping one of them."""

    def work(count: int) -> int:
        a = SimpleNamespace(name="a")
        queue, registry = AdmissionQueue(), Registry()
        requests = [request_of(a) for _ in range(count)]
        registry.accept(requests)
        queue.add(requests)
        drain(queue, {"a"})

        def turns() -> None:
            for request in requests[5:15]:
                drain(queue, {"a"})
                queue.discard(request)
                registry.cancel(request)

        return operations(turns)

    assert work(1000) == work(100)


# the inbox


def test_one_job_that_calls_the_model_runs_between_two_steps() -> None:
    inbox, done = Inbox(), []
    callers = [threading.Thread(target=inbox.call, args=(lambda: done.append("model"),)) for _ in range(3)]
    for caller in callers:
        caller.start()
    while inbox._jobs.qsize() < 3:
        callers[0].join(0.001)
    inbox.post(lambda: done.append("quick"))
    turns = []
    for _ in range(3):
        inbox.run(wait=True)
        turns.append(list(done))
        done.clear()
    assert turns == [["quick", "model"], ["model"], ["model"]]
    for caller in callers:
        caller.join(10)
    assert not any(caller.is_alive() for caller in callers)


def test_a_job_that_raises_tells_its_caller_alone() -> None:
    inbox, found = Inbox(), []

    def ask() -> None:
        with pytest.raises(ZeroDivisionError) as caught:
            inbox.call(lambda: 1 // 0)
        found.append(caught.value)

    caller = threading.Thread(target=ask)
    caller.start()
    inbox.run(wait=True)
    caller.join(10)
    assert len(found) == 1


def test_a_closed_inbox_leaves_nobody_waiting() -> None:
    inbox, found = Inbox(), []

    def ask() -> None:
        with pytest.raises(EngineClosedError) as caught:
            inbox.call(lambda: 1)
        found.append(caught.value)

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    while inbox._jobs.qsize() < 4:
        callers[0].join(0.001)
    inbox.close()
    inbox.run_rest()
    for caller in callers:
        caller.join(10)
    assert len(found) == 4 and not inbox.post(lambda: None) and not inbox.accepting
    with pytest.raises(EngineClosedError):
        inbox.call(lambda: 1)


def test_a_draining_inbox_runs_jobs_and_takes_no_calls() -> None:
    inbox, done = Inbox(), []
    inbox.drain()
    assert inbox.post(lambda: done.append(1)) and not inbox.accepting
    with pytest.raises(EngineClosedError):
        inbox.call(lambda: 1)
    inbox.run(wait=True)
    assert done == [1]
