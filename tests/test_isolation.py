"""One request's trouble is its own: the others of its step get what they would have got without it."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from families import save_experts
from meswitch.engine.engine import Engine
from meswitch.engine.request import Request
from meswitch.errors import MeswitchError, RequestError

PROMPT = "one prompt that is longer than a page of the prefix cache, which holds thirty-two tokens"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_experts(tmp_path_factory.mktemp("isolation"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    settings: dict[str, Any] = {"kv_budget": "8MiB", "max_batch_tokens": 64, "exact": True}
    with Engine(folder / "base", experts=folder / "experts", **settings) as engine:
        yield engine


def requests_of(engine: Engine, experts: list[str], **settings: Any) -> list[Request]:
    """Requests that are not submitted yet."""
    return engine._preparation.requests([PROMPT] * len(experts), experts, settings)


def settle(engine: Engine) -> dict[str, int]:
    """The counts of requests, when nothing is held any more."""
    engine._worker.call(lambda: None)
    assert not engine._worker.live and not engine._worker.registry
    assert not engine._worker.scheduler.slots and not engine._worker.sampler.states
    assert all(expert["uses"] == 0 for expert in engine.experts.values())
    requests: dict[str, int] = engine.stats()["requests"]
    assert requests["running"] == requests["waiting"] == 0
    return requests


def raises(ids: Tensor, scores: Tensor) -> Tensor:
    raise TypeError("unsupported operand")


PROCESSORS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "raises": raises,
    "nan": lambda ids, scores: scores * torch.nan,
    "one nan": lambda ids, scores: scores.index_fill(1, torch.tensor([3]), torch.nan),
    "nothing left": lambda ids, scores: scores - torch.inf,
    "infinite": lambda ids, scores: scores.index_fill(1, torch.tensor([3, 4]), torch.inf),
    "wrong shape": lambda ids, scores: scores[0, :0],
    "not a tensor": lambda ids, scores: None,
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("limit", [1, 30])
def test_a_row_that_cannot_be_sampled_fails_alone(engine: Engine, name: str, limit: int) -> None:
    expected = engine.generate([PROMPT] * 2, expert=["b", "base"], max_new_tokens=12, temperature=1.0, seed=3)
    failed = settle(engine)["failed"]
    wrong = requests_of(engine, ["a", "a"], max_new_tokens=limit, temperature=1.0)
    for request in wrong:
        request.sampling.processors = LogitsProcessorList([PROCESSORS[name]])
    right = requests_of(engine, ["b", "base"], max_new_tokens=12, temperature=1.0, seed=3)
    engine._worker.submit([wrong[0], *right, wrong[1]])
    for request in wrong:
        with pytest.raises(RequestError, match="sampling failed: "):
            request.result()
    assert [request.result() for request in right] == expected
    assert settle(engine)["failed"] == failed + 2


@pytest.mark.parametrize("name", ["raises", "nan", "one nan", "nothing left"])
def test_a_greedy_row_too(engine: Engine, name: str) -> None:
    [request] = requests_of(engine, ["a"], max_new_tokens=5)
    request.sampling.processors = LogitsProcessorList([PROCESSORS[name]])
    engine._worker.submit([request])
    with pytest.raises(RequestError, match="sampling failed: "):
        request.result()
    settle(engine)


def test_a_model_that_gives_no_numbers_fails_its_own_rows(engine: Engine, monkeypatch: Any) -> None:
    expected = engine.generate([PROMPT] * 2, expert=["b", "base"], max_new_tokens=6)
    wrong, *right = requests_of(engine, ["a", "b", "base"], max_new_tokens=6)

    def broken(ids: list[str], scores: Tensor) -> None:
        if wrong.id in ids:
            scores[ids.index(wrong.id), 7] = torch.nan

    monkeypatch.setattr(engine._worker.sampler, "observe", broken)
    engine._worker.submit([wrong, *right])
    with pytest.raises(RequestError, match="found NaN or infinity"):
        wrong.result()
    assert [request.result() for request in right] == expected
    settle(engine)


def test_no_number_in_the_call_hurts_a_neighbour(engine: Engine) -> None:
    """Refused, failed or answered: the neighbour has its text."""
    expected = engine.generate(PROMPT, expert="b", max_new_tokens=20)
    for settings in (
        *({"temperature": value} for value in (1e-45, 1e-40, 1e-30, 1e300)),
        *({"repetition_penalty": value, "temperature": 1.0} for value in (1e-300, 1e-46, 1e300)),
        *({"top_p": 1e-300}, {"min_p": 1.0, "temperature": 1e-40}, {"top_k": 2**62, "temperature": 1.0}),
    ):
        neighbour = engine.stream(PROMPT, expert="b", max_new_tokens=20)
        with contextlib.suppress(RequestError):
            engine.generate(PROMPT, expert="a", max_new_tokens=3, **settings)
        assert "".join(neighbour) == expected.text
    settle(engine)


@pytest.mark.parametrize("step", ["add", "finish"])
def test_a_tokenizer_that_raises_ends_its_own_request(engine: Engine, step: str, monkeypatch: Any) -> None:
    expected = engine.generate(PROMPT, expert="b", max_new_tokens=20)
    wrong, right = requests_of(engine, ["a", "b"], max_new_tokens=20)

    def broken(*args: Any) -> str:
        raise IndexError("nothing to decode")

    monkeypatch.setattr(wrong.decoder, step, broken)
    engine._worker.submit([wrong, right])
    with pytest.raises(MeswitchError, match="could not be decoded: IndexError: nothing to decode"):
        wrong.result()
    assert right.result() == expected
    settle(engine)


def test_an_expert_that_cannot_be_installed_fails_its_requests_alone(
    engine: Engine, folder: Path, monkeypatch: Any
) -> None:
    expected = engine.generate(PROMPT, expert="b", max_new_tokens=5)
    engine.add_expert("wrong", folder / "experts" / "a")
    wrong, late, right = requests_of(engine, ["wrong", "wrong", "b"], max_new_tokens=5)
    layers, residency = engine._worker.layers, engine._worker.pool.residency
    installing = layers.installing

    def broken(*args: Any, **kwargs: Any) -> Any:
        yield from installing(*args, **kwargs)
        if residency._installing[0].expert is wrong.expert:
            raise ValueError("codes of another shape")

    monkeypatch.setattr(layers, "installing", broken)
    engine._worker.submit([wrong, right])
    with pytest.raises(MeswitchError, match="'wrong' could not be loaded: ValueError: codes of another shape"):
        wrong.result()
    assert right.result() == expected
    engine._worker.submit([late])  # it has acquired the expert before
    with pytest.raises(MeswitchError, match="'wrong' could not be loaded: ValueError: codes of another shape"):
        late.result()
    with pytest.raises(ValueError, match="codes of another shape"):  # it is not tried again at once
        engine.generate(PROMPT, expert="wrong")
    assert "codes of another shape" in engine.experts["wrong"]["error"]
    engine.remove_expert("wrong")
    settle(engine)


class Marker:
    """Stands for the tensors of a step."""


def test_errors_are_one_each_and_keep_nothing_alive(engine: Engine, monkeypatch: Any) -> None:
    markers: list[weakref.ref[Marker]] = []

    def broken(*args: Any, **kwargs: Any) -> Any:
        marker = Marker()
        markers.append(weakref.ref(marker))
        try:
            raise KeyError("first")
        except KeyError as first:
            raise RuntimeError("out of luck") from first

    requests = requests_of(engine, ["a", "b"], max_new_tokens=5)
    with monkeypatch.context() as patched:
        patched.setattr(engine._worker.model, "forward", broken)
        engine._worker.submit(requests)
        raised = []
        for request in [*requests, *requests]:
            with pytest.raises(MeswitchError, match="a step failed: RuntimeError: out of luck") as caught:
                request.result()
            raised.append(caught.value)
    assert len(set(map(id, raised))) == 4
    assert isinstance(raised[0].__cause__, RuntimeError) and isinstance(raised[0].__cause__.__cause__, KeyError)
    settle(engine)
    gc.collect()
    assert len(markers) == 1 and markers[0]() is None


def test_whatever_ends_the_thread_every_request_ends(folder: Path, monkeypatch: Any) -> None:
    """Requests in the batch, waiting for room, waiting to be admitted, and calls: nobody waits for ever."""
    room = 1 << 20
    engine = Engine(folder / "base", experts=folder / "experts", max_batch_tokens=64, host_budget=room)
    worker = engine._worker
    held, go = threading.Event(), threading.Event()
    worker.inbox.post(lambda: (held.set(), go.wait(60)))  # type: ignore[arg-type,func-returns-value]
    held.wait(60)
    streams = [engine.stream(PROMPT, expert=name, max_new_tokens=50) for name in ("a", "b", "base", "a")]
    monkeypatch.setattr(worker, "_begin_step", lambda: (_ for _ in ()).throw(SystemExit(3)))
    monkeypatch.setattr(worker.pool, "close", lambda: 1 / 0)
    found: list[BaseException] = []

    def read(stream: Any) -> None:
        with pytest.raises(MeswitchError, match="thread ended: SystemExit: 3") as caught:
            list(stream)
        found.append(caught.value)

    readers = [threading.Thread(target=read, args=(stream,), daemon=True) for stream in streams * 2]
    for reader in readers:
        reader.start()
    go.set()
    for reader in readers:
        reader.join(60)
    assert len(set(map(id, found))) == 8
    with pytest.raises(MeswitchError, match="the engine is closed"):
        engine.generate(PROMPT)
    assert engine.stats()["requests"]["failed"] == 4
    engine.close()


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("how", ["shorter", "overwritten", "removed", "replaced"])
def test_a_file_that_changes_while_it_is_served(folder: Path, tmp_path: Path, how: str, resident: bool) -> None:
    """The expert that was opened answers, or an error of that expert does; the others and the process go on."""
    for name in ("base", "experts"):
        shutil.copytree(folder / name, tmp_path / name)
    settings: dict[str, Any] = {"kv_budget": "8MiB", "max_batch_tokens": 64, "exact": True}
    with Engine(tmp_path / "base", experts=tmp_path / "experts", **settings) as engine:
        expected = {name: engine.generate([PROMPT], expert=name, max_new_tokens=6)[0].token_ids for name in ("a", "b")}
        if not resident:
            engine.remove_expert("a")
            engine.add_expert("a", tmp_path / "experts/a")
        file = tmp_path / "experts/a/delta.safetensors"
        other = (tmp_path / "experts/b/delta.safetensors").read_bytes()
        if how == "shorter":
            os.truncate(file, 0)
        elif how == "overwritten":
            with file.open("r+b") as open_file:
                open_file.write(other)
        else:
            file.unlink()
            if how == "replaced":
                file.write_bytes(other)
        for base_file in (tmp_path / "base").glob("*.safetensors"):
            os.truncate(base_file, 0)
        if resident or how in ("removed", "replaced"):
            assert engine.generate([PROMPT], expert="a", max_new_tokens=6)[0].token_ids == expected["a"]
        else:
            with pytest.raises(MeswitchError, match=r"of .*delta.safetensors"):
                engine.generate([PROMPT], expert="a", max_new_tokens=6)
        engine.add_expert("c", tmp_path / "experts/b")
        for name in ("b", "c"):
            assert engine.generate([PROMPT], expert=name, max_new_tokens=6)[0].token_ids == expected["b"]
