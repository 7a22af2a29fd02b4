"""An engine whose experts have a budget on the device and another one in host memory behind it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from families import config_of, save_finetune, save_random
from meswitch import Engine, compress
from meswitch.engine import engine as engine_module
from meswitch.engine import loading
from meswitch.engine.loading import Settings
from meswitch.errors import BudgetError, ChecksumError, RequestError
from meswitch.kernels.cuda import CudaKernels
from meswitch.kernels.protocol import Kernels

PROMPT = [1, 2, 3, 4]
NAMES = "abcd"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and four experts of it."""
    folder = tmp_path_factory.mktemp("device-budget")
    base = save_random(folder / "base", config_of("llama"))
    for seed, name in enumerate(NAMES):
        tuned = save_finetune(folder / f"tuned-{name}", base, seed=seed + 1)
        compress(base, tuned, folder / "experts" / name)
    return folder


@pytest.fixture(scope="module")
def on_a_device(cuda_library: Path) -> Iterator[None]:
    """Engines run on the CPU with kernels that copy what they are given, as to a device."""
    kernels = CudaKernels("cpu", driver=cuda_library)

    def select(name: str, device: torch.device, *, exact: bool = False) -> Kernels:
        return kernels

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loading, "select_kernels", select)
        yield


@pytest.fixture
def engine_of(
    made: Path, on_a_device: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:  # a context manager of an engine
    @contextmanager
    def engine_of(device: float, host: float, experts: Path = made / "experts") -> Iterator[Engine]:
        """With room for so many experts on the device and in host memory."""
        with Engine(made / "base", experts, kv_budget="8MiB", max_batch_tokens=64) as probe:
            largest = max(expert["bytes"] for expert in probe.experts.values())
        budget = int(device * largest)
        monkeypatch.setattr(engine_module, "Settings", lambda **own: Settings(**{**own, "device_budget": budget}))
        sizes: dict[str, Any] = {"kv_budget": "8MiB", "max_batch_tokens": 64, "host_budget": int(host * largest)}
        with Engine(made / "base", experts, dtype="float32", **sizes) as engine:
            yield engine

    return engine_of


@pytest.fixture(scope="module")
def alone(made: Path, on_a_device: None) -> dict[str, list[int]]:
    """What each expert answers in an engine without budgets."""
    settings: dict[str, Any] = {"kv_budget": "8MiB", "max_batch_tokens": 64, "dtype": "float32"}
    with Engine(made / "base", made / "experts", **settings) as engine:
        assert engine.stats()["device"] is None
        return {name: ids_of(engine, [name])[0] for name in NAMES}


def ids_of(engine: Engine, names: list[str], tokens: int = 3) -> list[list[int]]:
    answers = engine.generate([PROMPT] * len(names), expert=names, max_new_tokens=tokens)
    return [answer.token_ids for answer in answers]


def where(engine: Engine) -> dict[str, str]:
    return {name: expert["residency"] for name, expert in engine.experts.items()}


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_experts_that_leave_the_device_stay_in_host_memory(
    engine_of: Callable[..., Any], alone: dict[str, list[int]]
) -> None:
    with engine_of(2, 4) as engine:
        assert ids_of(engine, list(NAMES)) == list(alone.values())
        host, device = engine.stats()["host"], engine.stats()["device"]
        assert device["bytes"] <= device["budget"]
        assert (device["loads"], device["evictions"], host["loads"], host["evictions"]) == (4, 2, 4, 0)
        assert sorted(where(engine).values()) == ["device", "device", "host", "host"]
        left = [name for name, place in where(engine).items() if place == "host"]
        assert ids_of(engine, left) == [alone[name] for name in left]
        host, device = engine.stats()["host"], engine.stats()["device"]
        assert (device["loads"], device["evictions"], host["loads"]) == (6, 4, 4), "no byte was read from disk"
        assert (device["hits"], device["misses"], host["hits"], host["misses"]) == (0, 6, 2, 4)
        assert ids_of(engine, left) == [alone[name] for name in left]
        assert engine.stats()["device"]["hits"] == 2 and engine.stats()["host"]["hits"] == 2


def test_experts_on_the_device_need_no_host_memory(engine_of: Callable[..., Any], alone: dict[str, list[int]]) -> None:
    with engine_of(4, 1) as engine:
        for _ in range(2):
            assert ids_of(engine, list(NAMES)) == list(alone.values())
            assert set(where(engine).values()) == {"device"}
            assert engine.stats()["host"]["loads"] == 4 and engine.stats()["device"]["evictions"] == 0


def test_both_are_too_small(engine_of: Callable[..., Any], alone: dict[str, list[int]]) -> None:
    with engine_of(1, 1) as engine:
        names = list("abcdabdcabca")
        assert ids_of(engine, names) == [alone[name] for name in names]
        for name in "badc":
            assert ids_of(engine, [name]) == [alone[name]]
        for tier in ("host", "device"):
            counters = engine.stats()[tier]
            assert counters["bytes"] <= counters["budget"] and counters["evictions"] >= 7


def test_prefetch_and_pin(engine_of: Callable[..., Any], alone: dict[str, list[int]]) -> None:
    with engine_of(2, 4) as engine:
        engine.prefetch("c")
        until(lambda: bool(where(engine)["c"] == "device"))
        engine.prefetch("c")  # there is nothing to do
        engine.pin("c")
        for name in "abd":
            assert ids_of(engine, [name]) == [alone[name]]
        assert where(engine) == {"a": "host", "b": "host", "c": "device", "d": "device"}
        engine.prefetch("a")  # from host memory
        until(lambda: bool(where(engine)["a"] == "device"))
        assert engine.stats()["host"]["loads"] == 4
        engine.pin("a")
        with pytest.raises(BudgetError, match=r"pinned experts would need \d+ bytes, device_budget is"):
            engine.pin("b")
        engine.unpin("c")
        assert ids_of(engine, ["b"]) == [alone["b"]]
        assert where(engine)["c"] == "host"


def test_an_expert_that_breaks_comes_back(
    made: Path, engine_of: Callable[..., Any], alone: dict[str, list[int]], tmp_path: Path
) -> None:
    folder = tmp_path / "experts"
    shutil.copytree(made / "experts", folder)
    with engine_of(1, 1, folder) as engine:
        assert ids_of(engine, ["a"]) == [alone["a"]]
        weights = next((folder / "b").glob("*.safetensors"))
        sound = weights.read_bytes()
        weights.write_bytes(sound[:-64] + bytes(64 * [0xAA]))
        with pytest.raises(ChecksumError):
            ids_of(engine, ["b"])
        assert ids_of(engine, ["c", "a"]) == [alone["c"], alone["a"]]
        weights.write_bytes(sound)
        assert ids_of(engine, ["b"]) == [alone["b"]]
        engine.remove_expert("b")
        assert ids_of(engine, ["a"]) == [alone["a"]]
        assert set(where(engine)) == {"a", "c", "d"}


def test_what_does_not_fit_is_refused(made: Path, engine_of: Callable[..., Any]) -> None:
    with engine_of(0.5, 4) as engine:
        with pytest.raises(BudgetError, match=r"expert 'a' needs \d+ bytes, device_budget is \d+ bytes"):
            ids_of(engine, ["a"])
        assert engine.stats()["host"]["bytes"] == 0
    with pytest.raises(RequestError, match="device_budget: expected none with device='cpu'"):
        Engine(made / "base", device_budget="1GiB")
