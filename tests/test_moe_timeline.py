"""Traces of MoE experts: what an engine writes, `meswitch replay` on it, and `meswitch moe timeline`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meswitch import Engine
from meswitch.errors import DataError, RequestError
from meswitch.moe import timeline
from meswitch.moe.timeline import read_timeline
from test_cli import read, run
from test_engine_families import prompts_of
from test_moe_offload import least_budget, save

START = {"t": 0.0, "event": "start", "version": 1, "budget": 25_000_000, "policy": "lru"}
Event = tuple[float, str, str]


def write(path: Path, events: Iterable[Event], nbytes: int = 1000) -> Path:
    """A trace of these events: time, kind, unit."""
    rows = [{"t": t, "event": kind, "expert": unit, "bytes": nbytes, "ms": 1.0} for t, kind, unit in events]
    path.write_text("".join(json.dumps(row) + "\n" for row in [START, *rows]))
    return path


def unit(layer: int, number: int, stack: str = "up_proj") -> str:
    return f"model.layers.{layer}.mlp.experts.{stack}[{number}]"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Ten seconds of two layers: MoE expert 0 of the first is there from 2 to 6 s, 3 of the second from 5 s on."""
    events: list[Event] = [
        (1.0, "request", unit(0, 0)),
        (2.0, "load", unit(0, 0)),
        (3.0, "request", unit(0, 0)),
        (4.0, "request", unit(1, 3)),
        (5.0, "load", unit(1, 3)),
        (6.0, "evict", unit(0, 0)),
        (7.0, "request", unit(0, 0)),
        (10.0, "request", unit(1, 3)),
    ]
    return write(tmp_path / "trace.jsonl", events)


def test_an_engine_writes_what_its_counters_say(tmp_path: Path) -> None:
    base, trace = save(tmp_path, "qwen3_moe"), tmp_path / "trace.jsonl"
    with Engine(base, moe_budget=3 * least_budget(base), moe_trace=trace) as engine:
        engine.generate(prompts_of(40), max_new_tokens=8)
        counters = engine.stats()["moe"]
    found = read_timeline(trace)
    assert counters["hits"] > 0 and counters["evictions"] > 0
    of_layers = {layer.name: {"hits": layer.hits, "misses": layer.requests - layer.hits} for layer in found.layers}
    assert of_layers == counters["layers"]
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert (lines[0]["budget"], lines[0]["policy"]) == (counters["budget"], "lru")
    assert sum(line["event"] == "load" for line in lines) == counters["loads"]
    assert sum(line["event"] == "evict" for line in lines) == counters["evictions"]
    names = {line["expert"] for line in lines[1:]}
    stacks = ("gate_up_proj", "down_proj")
    assert names <= {unit(layer, number, stack) for layer in (0, 1) for number in range(8) for stack in stacks}
    # Of all bytes: a slot is a little larger than its matrix.
    assert 0 < found.resident_share <= counters["budget"] / (2 * 8 * found.layers[0].nbytes)

    report = read("replay", trace, "--policy", "lru")
    assert report["requests"] == counters["hits"] + counters["misses"] and report["experts"] == len(names)


def test_a_trace_that_cannot_be_written(tmp_path: Path) -> None:
    base = save(tmp_path, "mixtral")
    budget = least_budget(base)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Engine(base, moe_budget=budget, moe_trace=tmp_path / "no such folder" / "trace.jsonl")
    with pytest.raises(RequestError, match=r"moe_trace: expected None without moe_budget, found 'trace\.jsonl'"):
        Engine(base, moe_trace="trace.jsonl")
    assert run("generate", base, "hi", "--moe-trace", tmp_path / "trace.jsonl").exit_code == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = save(tmp_path, "mixtral")
    with (
        caplog.at_level(logging.WARNING, logger="meswitch.moe.store"),
        Engine(base, moe_budget=least_budget(base), moe_trace="/dev/full") as engine,
    ):
        while not caplog.records:  # the writer comes to it within a second
            engine.generate(prompts_of(5), max_new_tokens=8)
        engine.generate(prompts_of(5), max_new_tokens=8)
    assert [record.message.split(":")[0] for record in caplog.records] == ["the trace of MoE experts has ended"]


def test_residency_over_time(small: Path) -> None:
    found = read_timeline(small)
    assert found.seconds == 10.0 and [layer.name[:14] for layer in found.layers] == ["model.layers.0", "model.layers.1"]
    first, second = found.layers
    assert (first.requests, first.hits, second.requests, second.hits) == (3, 1, 2, 1)
    times = (np.arange(timeline.BINS) + 0.5) * 10 / timeline.BINS
    expected = np.zeros((4, timeline.BINS))
    expected[0] = (times > 2) & (times < 6)
    assert np.allclose(first.resident, expected)
    assert second.resident_share == pytest.approx(0.5 / 4) and found.resident_share == pytest.approx(0.9 / 8)


def test_a_moe_expert_is_there_by_its_bytes(tmp_path: Path) -> None:
    events: list[Event] = [
        (0.0, "load", unit(0, 0)),
        (1.0, "request", unit(0, 0)),
        (1.0, "request", unit(0, 0, "down_proj")),
        (2.0, "load", unit(0, 0, "down_proj")),
        (4.0, "request", unit(0, 1)),
    ]
    [layer] = read_timeline(write(tmp_path / "trace.jsonl", events)).layers
    assert layer.resident[0, [0, -1]].tolist() == [0.5, 1.0] and layer.resident_share == pytest.approx(0.75 / 2)


def test_json(small: Path) -> None:
    report = read("moe", "timeline", small)
    assert report == {
        "seconds": 10.0,
        "hit_rate": pytest.approx(2 / 5),
        "resident_share": pytest.approx(0.9 / 8),
        "layers": {
            "model.layers.0.mlp.experts": {
                "moe_experts": 4,
                "requests": 3,
                "hits": 1,
                "hit_rate": pytest.approx(1 / 3),
                "resident_share": pytest.approx(0.4 / 4),
            },
            "model.layers.1.mlp.experts": {
                "moe_experts": 4,
                "requests": 2,
                "hits": 1,
                "hit_rate": 0.5,
                "resident_share": pytest.approx(0.5 / 4),
            },
        },
    }


def test_the_table_is_for_people(small: Path) -> None:
    said = run("moe", "timeline", small).stdout.splitlines()
    shares = "40.0% of what was needed was in memory, and 11.2% of the bytes"
    assert said[0] == f"8 MoE experts in 2 layers over 10.0 s: {shares}"
    assert said[3].split() == ["model.layers.0.mlp.experts", "3", "33.3%", "10.0%"]


@pytest.mark.parametrize("name", ["residency.svg", "residency.png"])
def test_pictures_are_drawn_and_the_same_every_time(small: Path, tmp_path: Path, name: str) -> None:
    assert run("moe", "timeline", small, "-o", tmp_path / name).exit_code == 0
    drawn = (tmp_path / name).read_bytes()
    assert drawn.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    run("moe", "timeline", small, "-o", tmp_path / name)
    assert (tmp_path / name).read_bytes() == drawn
    if name.endswith("svg"):
        text = drawn.decode()
        assert all(f">{word}<" in text for word in ("seconds", "in memory", "hit rate, %", "0", "1"))


def test_a_picture_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    def drawn(seconds: int) -> int:
        events = [
            (at + layer / 9, kind, unit(layer, (at * 7 + layer) % 64))
            for at in range(seconds)
            for layer in range(8)
            for kind in ("request", "load", "evict")
        ]
        path = tmp_path / f"{seconds}.png"
        assert run("moe", "timeline", write(tmp_path / "trace.jsonl", events), "-o", path).exit_code == 0
        return path.stat().st_size

    assert drawn(4000) < 4 * drawn(200)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "line 1: expected the start of a trace"),
        ([START], "expected requests, found none"),
        ([START, {"event": "request", "expert": unit(0, 0)}], "line 2: missing field `bytes`"),
        ([{**START, "version": 2}], "line 1: expected a trace of version 1, found version 2"),
        ([START, {"event": "request", "expert": "math", "bytes": 1}], "expected matrices of MoE experts.*'math'"),
        ([START, {"event": "request", "expert": unit(0, 65536), "bytes": 1}], "at most 65536 MoE experts, found 65537"),
        ([START, {"event": "request", "expert": unit(0, 0), "bytes": 0}], "expected matrices of some bytes"),
    ],
)
def test_broken_traces_are_data_errors(tmp_path: Path, lines: list[Any], expected: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=expected):
        read_timeline(path)
    found = run("moe", "timeline", path)
    assert found.exit_code == 1 and found.stderr.startswith(f"DataError: {path}")


@pytest.mark.parametrize("at", [0.0, 1e300, -3.0])
def test_any_time_is_taken(tmp_path: Path, at: float) -> None:
    events: list[Event] = [(1.0, "load", unit(0, 0)), (at, "evict", unit(0, 0)), (at, "request", unit(0, 1))]
    [layer] = read_timeline(write(tmp_path / "trace.jsonl", events)).layers
    assert np.isfinite(layer.resident).all() and layer.hits == 0


def test_wrong_usage(small: Path, tmp_path: Path) -> None:
    assert run("moe", "timeline", small, "-o", tmp_path / "residency.txt").exit_code == 2
    assert run("moe", "timeline").exit_code == 2
