"""More experts than memory, while experts, their files and the budget change: every answer is right.

`benches/load.py` asks the same of the tiny family, for longer.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from serving.budget import BudgetWatch
from serving.churn import Churn
from serving.traffic import Answers, Truth, arrivals, run_clients

from families import config_of, save_finetune, save_random
from meswitch import Engine, compress

SERVED, SPARE, ROOM = 6, 2, 2
PROMPTS = ["a prompt that is longer than a page of the prefix cache, which has thirty-two tokens", "1 + 1 ="]
TOKENS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and experts by number."""
    folder = tmp_path_factory.mktemp("churn")
    base = save_random(folder / "base", config_of("llama"))
    for number in range(SERVED + SPARE):
        compress(base, save_finetune(folder / f"tuned-{number}", base, seed=number + 1), folder / f"{number}")
    return folder


def engine_of(made: Path, experts: dict[str, Path], **settings: Any) -> Engine:
    return Engine(made / "base", experts, kv_budget="8MiB", max_batch_tokens=64, dtype="float32", **settings)


@pytest.fixture(scope="module")
def alone(made: Path) -> Answers:
    answers: Answers = {}
    for number in range(SERVED + SPARE):
        with engine_of(made, {"alone": made / f"{number}"}) as engine:
            found = [engine.generate(prompt, expert="alone", max_new_tokens=TOKENS) for prompt in PROMPTS]
        answers[number] = {prompt: answer.token_ids for prompt, answer in zip(PROMPTS, found, strict=True)}
    return answers


def test_every_answer_is_right_whatever_changes(made: Path, alone: Answers, tmp_path: Path) -> None:
    assert len({str(answers) for answers in alone.values()}) == len(alone)
    numbers = {f"expert-{number}": number for number in range(SERVED)}
    with engine_of(made, {"one": made / "0"}) as probe:
        size = probe.experts["one"]["bytes"]
    truth = Truth(alone)
    churn = Churn(
        tmp_path,
        truth,
        numbers,
        lambda number: made / f"{number}",
        lambda number: [other for other in alone if other != number],
        (size, ROOM * size),
        every=0.02,
        pins=1,
    )
    requests = arrivals(list(numbers), dict.fromkeys(numbers, PROMPTS))
    with (
        engine_of(made, churn.paths, host_budget=ROOM * size) as engine,
        BudgetWatch(engine, ROOM * size, churn.changes, every=0.01) as held,
    ):

        def ask(name: str, prompt: str) -> list[int]:
            return engine.generate(prompt, expert=name, max_new_tokens=TOKENS, timeout=300).token_ids

        churn.begin(engine)
        outcome = run_clients(requests, ask, truth.fault, clients=8, count=100)
        churn.finish()
        for name in numbers:  # whatever was damaged is sound again
            for prompt in PROMPTS:
                assert truth.fault(name, prompt, time.monotonic(), ask(name, prompt)) is None
        stats = engine.stats()
    assert outcome.faults == churn.faults == held.faults == []
    assert held.largest <= ROOM * size and held.samples and churn.counts
    assert outcome.kinds["answered"] > 20 and sum(outcome.kinds.values()) == 100
    assert stats["requests"]["running"] == stats["requests"]["waiting"] == 0
    assert all(expert["uses"] == 0 for expert in stats["experts"].values())
