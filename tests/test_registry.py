"""Counts and order of requests that are accepted, wait, run and end."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meswitch.engine.admission import BATCH_SECONDS, PATIENCE_SECONDS, AdmissionQueue
from meswitch.engine.registry import Registry
from meswitch.engine.request import Deadline, Request
from meswitch.errors import MeswitchError, OverloadedError, RequestTimeoutError
from meswitch.experts.catalogue import Expert
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


class Room:
    """What the queue asks a residency: which experts are wanted, and which have room."""

    def __init__(self) -> None:
        self.ranks: dict[str, int | None] = {}
        self.roomy: set[str] = set()
        self.load_seconds = 0.0

    def want(self, expert: Any, rank: int | None) -> None:
        self.ranks[expert.name] = rank

    def has_room(self, expert: Any) -> bool:
        return expert.name in self.roomy

    def seconds_to_load(self, expert: Any) -> float:
        return self.load_seconds

    def first(self) -> list[str]:
        """The experts that are waited for, the one that gets room first first."""
        ranks = {name: rank for name, rank in self.ranks.items() if rank is not None}
        return sorted(ranks, key=lambda name: ranks[name])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Queue:
    """A queue with a clock, and what runs."""

    def __init__(self, max_experts: int | None = None) -> None:
        self.room, self.clock = Room(), Clock()
        self.queue = AdmissionQueue(self.room, max_experts, self.clock)  # type: ignore[arg-type]
        self.running: set[Any] = set()

    def add(self, *requests: Any) -> None:
        self.queue.add(requests)

    def load(self, expert: Any, slot: int | None = 0) -> None:
        expert.slot = slot
        self.queue.refresh(expert)

    def drain(self) -> list[str]:
        """Who gets in."""
        admitted = []
        while (request := self.queue.next(self.running)) is not None:
            self.queue.discard(request)
            admitted.append(request.id)
            if request.expert is not None:
                self.running.add(request.expert)
        return admitted


def experts_of(names: str) -> list[Expert]:
    return [Expert(name) for name in names]


def test_requests_wait_for_their_expert_and_hold_up_nobody() -> None:
    queue = Queue()
    a, b = experts_of("ab")
    one, two, three, four = (request_of(expert) for expert in (a, None, b, a))
    queue.add(one, two, three, four)
    assert queue.room.first() == ["a", "b"]
    assert queue.drain() == [two.id]
    queue.load(b)
    assert queue.drain() == [three.id] and queue.room.ranks["b"] is None
    queue.add(five := request_of(b), six := request_of())
    queue.load(a)
    assert queue.drain() == [one.id, four.id, five.id, six.id]  # in order of arrival, and within an expert
    assert not queue.queue and queue.room.first() == []


def test_an_expert_that_leaves_is_waited_for_again() -> None:
    queue = Queue()
    [a] = experts_of("a")
    queue.add(one := request_of(a), two := request_of(a))
    queue.load(a)
    request = queue.queue.next(())
    assert request is one
    queue.load(a, None)
    assert queue.drain() == [] and queue.room.first() == ["a"]
    queue.queue.discard(one)
    queue.load(a)
    assert queue.drain() == [two.id]


def test_nobody_starves() -> None:
    """One without room is passed by later ones for two loads, and then by the base's alone."""
    queue = Queue()
    a, b = experts_of("ab")
    queue.load(a)
    queue.room.roomy = {"a"}
    queue.room.load_seconds = 3.0
    queue.add(first := request_of(a), blocked := request_of(b), later := request_of(a))
    assert queue.drain() == [first.id, later.id]
    queue.clock.now = 5.9
    queue.add(another := request_of(a))
    assert queue.drain() == [another.id]
    queue.clock.now = 6.0
    queue.add(held := request_of(a), plain := request_of())
    assert queue.drain() == [plain.id] and queue.room.first() == ["b", "a"]
    queue.room.roomy = {"b"}  # what ran on a has ended, and b is being loaded
    assert queue.drain() == [held.id]
    queue.load(b)
    assert queue.drain() == [blocked.id]


def test_patience_has_a_least() -> None:
    queue = Queue()
    a, b = experts_of("ab")
    queue.load(a)
    queue.add(request_of(b))
    for now, passes in ((0.2, True), (PATIENCE_SECONDS, False)):
        queue.clock.now = now
        queue.add(request_of(a))
        assert bool(queue.drain()) is passes


def test_so_many_experts_run_at_a_time() -> None:
    queue = Queue(max_experts=2)
    experts = a, b, c = experts_of("abc")
    for expert in experts:
        queue.load(expert)
    requests = [request_of(expert) for expert in (a, b, c, a, b)]
    queue.add(*requests)
    assert queue.drain() == [requests[at].id for at in (0, 1, 3, 4)]
    queue.clock.now = 1.0
    queue.add(held := request_of(a), plain := request_of())
    assert queue.drain() == [plain.id]  # c has waited for long enough
    queue.running.discard(b)
    assert queue.drain() == [requests[2].id, held.id]


def test_what_can_wait_comes_last_and_not_never() -> None:
    queue = Queue()
    [a] = experts_of("a")
    batch, urgent = request_of(), request_of()
    other = request_of(a)
    batch.priority = other.priority = "batch"
    queue.add(batch, other, urgent)
    assert queue.queue.next(()) is urgent
    queue.queue.discard(urgent)
    assert queue.queue.next(()) is batch
    queue.clock.now = BATCH_SECONDS
    queue.add(fresh := request_of(), same := request_of(a))
    assert queue.queue.next(()) is batch
    queue.load(a)
    assert queue.drain() == [batch.id, other.id, fresh.id, same.id]


@given(st.integers(0, 2**32))
def test_the_queue_gives_each_request_once(seed: int) -> None:
    """Whatever comes, loads, leaves and is dropped, in any order."""
    chance, queue = random.Random(seed), Queue(max_experts=random.Random(seed).choice([None, 1, 2]))
    experts = experts_of("abcd")
    waiting: dict[str, Any] = {}
    for _ in range(100):
        queue.clock.now += chance.choice([0.0, 0.1, 40.0])
        for expert in experts:
            if chance.random() < 0.2:
                queue.load(expert, chance.choice([None, 1]))
        request = request_of(chance.choice([*experts, None]))
        request.priority = chance.choice(["interactive", "batch"])
        waiting[request.id] = request
        queue.add(request)
        if chance.random() < 0.2:
            queue.queue.discard(waiting.pop(chance.choice(list(waiting))))
        if chance.random() < 0.4:
            admitted = queue.drain()
            assert len(admitted) == len(set(admitted))
            for name in admitted:
                expert = waiting.pop(name).expert
                assert expert is None or expert.slot is not None
        if chance.random() < 0.5:
            queue.running.clear()
        assert len(queue.queue) == len(waiting)
        of_experts = {request.expert.name for request in waiting.values() if request.expert is not None}
        assert set(queue.room.first()) == of_experts
    for expert in experts:
        queue.load(expert)
    while waiting:
        queue.running.clear()
        admitted = queue.drain()
        assert admitted
        for name in admitted:
            del waiting[name]


def test_who_waits_costs_nothing() -> None:
    """A turn with many waiting, and dropping one of them."""

    def work(count: int) -> int:
        [a] = experts_of("a")
        queue, registry = Queue(), Registry()
        requests = [request_of(a) for _ in range(count)]
        registry.accept(requests)
        queue.add(*requests)

        def turns() -> None:
            for request in requests[5:15]:
                queue.drain()
                queue.queue.discard(request)
                registry.cancel(request)

        return operations(turns)

    assert work(1000) == work(100)
