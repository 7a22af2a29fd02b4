"""`meswitch replay`: what it prints and draws of a trace, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from meswitch import _native
from meswitch.cli.replay import budget_series
from meswitch.errors import DataError
from test_cli import read, run

START = {"t": 0.0, "event": "start", "version": 1, "budget": 25_000_000, "policy": "lru"}


def write(path: Path, experts: Iterable[str], **sizes: int) -> Path:
    """A trace of requests for experts of 10 MB, or of what `sizes` says."""
    rows = [
        {"t": float(at), "event": "request", "expert": name, "bytes": sizes.get(name, 10_000_000)}
        for at, name in enumerate(experts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [START, *rows]))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write(tmp_path / "trace.jsonl", "abcabbc")


def rows_of(report: dict[str, Any]) -> dict[tuple[int, str], dict[str, Any]]:
    return {(row["budget"], row["policy"]): row for row in report["replays"]}


def test_json_has_every_budget_and_policy_and_the_optimum(trace: Path) -> None:
    report = read("replay", trace, "--budget", "20MB", "--budget", "30 MB")
    assert {name: report[name] for name in ("requests", "experts", "largest", "total", "budget", "policy")} == {
        "requests": 7,
        "experts": 3,
        "largest": 10_000_000,
        "total": 30_000_000,
        "budget": 25_000_000,
        "policy": "lru",
    }
    rows = rows_of(report)
    assert list(rows) == [(size, name) for size in (20_000_000, 30_000_000) for name in ("lru", "lrfu", "optimal")]
    counts = {"requests": 7, "refused": 0, "hits": 1, "loads": 6, "bytes_read": 60_000_000, "evictions": 4}
    assert rows[20_000_000, "lru"] == {"budget": 20_000_000, "policy": "lru", "hit_rate": 1 / 7, **counts}
    assert rows[20_000_000, "optimal"]["hits"] == 3
    assert all(rows[30_000_000, name]["hits"] == 4 for name in ("lru", "lrfu", "optimal"))


def test_without_budgets_there_is_a_series(trace: Path) -> None:
    report = read("replay", trace, "--policy", "lru")
    assert [row["budget"] for row in report["replays"][::2]] == budget_series(10_000_000, 30_000_000)
    assert {row["policy"] for row in report["replays"]} == {"lru", "optimal"}


def test_sizes_may_be_beyond_any_machine(tmp_path: Path) -> None:
    report = read("replay", write(tmp_path / "trace.jsonl", "aba", a=2**64 - 1, b=2**64 - 2))
    assert [row["hits"] for row in report["replays"] if row["budget"] == 2**64 - 1] == [0, 0, 0]


def test_the_table_is_for_people(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", "abcabbc", c=40_000_000)
    said = run("replay", path, "--budget", "20MB", "--policy", "lru").stdout.splitlines()
    assert said[0] == ("7 requests for 3 units of 60.0 MB, the largest 40.0 MB; served under lru with 25.0 MB")
    assert [line.split() for line in said[2:5]] == [
        "budget policy hit rate loads evictions read of optimal".split(),
        "20.0 MB lru 42.9% 2 0 20.0 MB 1.00x".split(),
        "optimal 42.9% 2 0 20.0 MB 1.00x".split(),
    ]
    assert said[5] == "20.0 MB: 2 requests ask for a unit that is larger"


def test_lrfu_keeps_what_is_asked_for_often(tmp_path: Path) -> None:
    experts = [str(at % 40) if at % 3 else "often" for at in range(3000)]
    rows = rows_of(read("replay", write(tmp_path / "trace.jsonl", experts), "--budget", "20MB"))
    assert rows[20_000_000, "lru"]["hits"] == 0
    assert rows[20_000_000, "lrfu"]["hits"] > 950


@pytest.mark.parametrize("name", ["hits.svg", "hits.png"])
def test_plots_are_drawn_and_the_same_every_time(trace: Path, tmp_path: Path, name: str) -> None:
    assert run("replay", trace, "--plot", tmp_path / name).exit_code == 0
    drawn = (tmp_path / name).read_bytes()
    assert drawn.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    run("replay", trace, "--plot", tmp_path / name)
    assert (tmp_path / name).read_bytes() == drawn
    if name.endswith("svg"):
        text = drawn.decode()
        assert all(f">{word}<" in text for word in ("lru", "lrfu", "optimal", "10.0 MB", "30.0 MB"))


def test_a_plot_without_matplotlib_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = run("replay", tmp_path / "none", "--plot", tmp_path / "hits.png")
    assert found.exit_code == 1
    assert found.stderr.splitlines() == [
        "MissingPackageError: a plot needs matplotlib, which is not installed",
        "hint: pip install 'meswitch[plot]'",
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], "line 1: expected the start of a trace"),
        ([START], "expected requests, found none"),
        ([START, {"event": "request", "expert": "a"}], "line 2: missing field `bytes`"),
        ([{**START, "version": 2}], "line 1: expected a trace of version 1, found version 2"),
    ],
)
def test_broken_traces_are_data_errors(tmp_path: Path, lines: list[Any], expected: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=expected):
        _native.Trace(path)
    found = run("replay", path)
    assert found.exit_code == 1 and found.stderr.startswith(f"DataError: {path}") and "hint: " in found.stderr


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    found = run("replay", tmp_path / "none.jsonl")
    assert found.exit_code == 1 and found.stderr.startswith("FileNotFoundError: ") and "none.jsonl" in found.stderr


@pytest.mark.parametrize(
    "options", [["--policy", "fifo"], ["--budget", "0"], ["--budget", "2 furlongs"], ["--plot", "hits.txt"]]
)
def test_wrong_usage(trace: Path, options: list[str]) -> None:
    assert run("replay", trace, *options).exit_code == 2


def test_help_names_the_policies() -> None:
    assert f"--policy {'|'.join(_native.policies())}" in run("replay", "--help").stdout
