"""More experts than memory, asked by many clients while experts and their files change: is every answer right?

    python benches/load.py [--experts 64] [--room 8] [--clients 32] [--requests 10000 | --seconds N] [--quiet 600]
                           [--eviction lru --eviction lrfu] [--seed 0] [--folder DIR] [--json]

Mixtures of the tiny family's three fine-tunes are compressed into a folder (kept in the cache, or in `--folder`); the
host budget holds so many of them (`--room`). Clients that each wait for their answer ask experts by Zipf's law, greedy,
in float32. First every expert answers alone, in an engine that has no other; then

    quiet     --quiet requests under each eviction policy, and the same from whole models: restored checkpoints under
              transformers, as many in memory as the bytes of base and budget hold, least recently used, all who wait
              for a model in one batch
    churn     --requests requests, or those of --seconds, under the first policy, while a thread replaces, removes and
              adds experts, damages their files in place and repairs them, pins, prefetches, and changes the budget

An answer is right if it is that of an expert that the name stood for while the request ran. An error is right if the
expert was away or its files were damaged then. The bench ends with status 1 unless every answer and error is right and
memory stayed within the budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serving.budget import BudgetWatch
from serving.churn import Churn
from serving.memory import MemoryWatch
from serving.mixtures import Mixtures, mixtures
from serving.restored import RestoredModels
from serving.traffic import Outcome, Truth, arrivals, run_clients
from transformers.utils import logging

from meswitch.demo.family import cache_folder
from meswitch.engine.engine import Engine
from meswitch.experts.counts import percentiles

TOKENS = 12  # of an answer
SPARE = 8  # experts that are not served at first, and replace others
SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_budget": "32MiB"}


class Load:
    """The experts, what each answers alone, and the two rounds."""

    def __init__(self, made: Mixtures, arguments: argparse.Namespace) -> None:
        self.made, self.arguments = made, arguments
        self.numbers = {f"expert-{number:02}": number for number in range(arguments.experts)}
        self.budget = arguments.room * made.largest
        prompts = made.prompts()
        self.prompts = {name: prompts[made.domain(number)] for name, number in self.numbers.items()}
        self.alone = {number: self._answers_alone(number, prompts[made.domain(number)]) for number in range(made.count)}

    def _answers_alone(self, number: int, prompts: list[str]) -> dict[str, list[int]]:
        with Engine(self.made.family.base, {"alone": self.made.delta(number)}, **SETTINGS) as engine:
            answers = [engine.generate(prompt, expert="alone", max_new_tokens=TOKENS) for prompt in prompts]
        return {prompt: answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)}

    def siblings(self, number: int) -> list[int]:
        """The other experts of its domain."""
        return [one for one in self.alone if one != number and self.made.domain(one) == self.made.domain(number)]

    def different(self) -> float:
        """The share of pairs of experts of one domain that do not answer all prompts alike."""
        pairs = [(one, other) for one in self.alone for other in self.siblings(one)]
        return sum(self.alone[one] != self.alone[other] for one, other in pairs) / len(pairs)

    # The rounds.

    def quiet(self) -> dict[str, Any]:
        """The same requests to the engine and to whole models."""
        engines = {policy: self._quiet_engine(policy) for policy in self.arguments.eviction}
        base = sum(path.stat().st_size for path in self.made.family.base.glob("*.safetensors"))
        room = (2 * base + self.budget) // base  # our base is in float32, their models are in bfloat16
        wholes = {name: self.made.whole(number) for name, number in self.numbers.items()}
        models = RestoredModels(self.made.family.base, wholes, room, TOKENS)
        theirs = self._run(models.generate, failed, count=self.arguments.quiet)
        models.close()
        return {
            **{policy: outcome_of(ours) | described(stats) for policy, (ours, stats) in engines.items()},
            "restored": outcome_of(theirs) | {"models": room, "loads": models.loads, "batches": models.batches},
            "requests a second / restored's": {
                policy: round(ours.rate / theirs.rate, 2) for policy, (ours, _) in engines.items()
            },
            "faults": [*theirs.faults, *(fault for ours, _ in engines.values() for fault in ours.faults)],
        }

    def _quiet_engine(self, policy: str) -> tuple[Outcome, dict[str, Any]]:
        truth = Truth(self.alone)
        for name, number in self.numbers.items():
            truth.begins(name, number)
        experts = {name: self.made.delta(number) for name, number in self.numbers.items()}
        with self._engine(experts, policy) as engine:
            return self._run(asking(engine), truth.fault, count=self.arguments.quiet), engine.stats()

    def churn(self) -> dict[str, Any]:
        """Requests while all changes."""
        count = None if self.arguments.seconds else self.arguments.requests
        budgets = (max(self.arguments.room // 2, 2) * self.made.largest, self.budget)
        truth = Truth(self.alone)
        with tempfile.TemporaryDirectory() as folder, MemoryWatch() as memory:
            churn = Churn(Path(folder), truth, self.numbers, self.made.delta, self.siblings, budgets)
            policy = self.arguments.eviction[0]
            with self._engine(churn.paths, policy) as engine, BudgetWatch(engine, self.budget, churn.changes) as held:
                churn.begin(engine)
                outcome = self._run(asking(engine), truth.fault, count=count, seconds=self.arguments.seconds)
                churn.finish()
                stats = engine.stats()
        return {
            "engine": outcome_of(outcome) | described(stats),
            "changes": dict(churn.counts),
            "host": held.summary(),
            "process": memory.summary(),
            "faults": [*outcome.faults, *churn.faults, *held.faults],
        }

    def _engine(self, experts: Mapping[str, Path], policy: str) -> Engine:
        settings = SETTINGS | {"host_budget": self.budget, "eviction": policy}
        return Engine(self.made.family.base, experts, **settings)

    def _run(self, ask: Any, fault: Any, **until: Any) -> Outcome:
        requests = arrivals(list(self.numbers), self.prompts, self.arguments.seed)
        return run_clients(requests, ask, fault, clients=self.arguments.clients, **until)


def asking(engine: Engine) -> Callable[[str, str], list[int]]:
    """Asks an expert a prompt; the timeout is for what would wait for ever."""
    return lambda name, prompt: engine.generate(prompt, name, max_new_tokens=TOKENS, timeout=300).token_ids


def failed(name: str, prompt: str, asked: float, found: list[int] | Exception) -> str | None:
    return f"{name}, whole: {found!r}" if isinstance(found, Exception) else None


def outcome_of(outcome: Outcome) -> dict[str, Any]:
    return {
        **dict(outcome.kinds),
        "seconds": round(outcome.elapsed, 1),
        "requests_per_second": round(outcome.rate, 1),
        "latency_ms": rounded(percentiles(outcome.seconds, 1e3)),
    }


def described(stats: dict[str, Any]) -> dict[str, Any]:
    host = stats["host"]
    return {
        "hit_rate": round(host["hits"] / max(host["hits"] + host["misses"], 1), 3),
        **{name: host[name] for name in ("loads", "failed_loads", "stopped_loads", "evictions")},
        "load_ms": rounded(percentiles([one["load_ms"]["p50"] for one in stats["experts"].values() if one["load_ms"]])),
        "queue_ms": rounded(stats["answered"]["queue_ms"]),
        "tokens_per_step": round(stats["step_tokens"] / stats["steps"], 1),
    }


def rounded(values: Mapping[str, float] | None) -> dict[str, float]:
    return {name: round(value, 1) for name, value in (values or {}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--room", type=int, default=8, help="experts that the host budget holds")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, help="instead of so many requests")
    parser.add_argument("--quiet", type=int, default=600, help="requests to the engine and to whole models; 0: none")
    parser.add_argument("--eviction", action="append", help="may be given more than once (default: lru and lrfu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the experts are kept (default: the cache)")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    arguments = parser.parse_args()
    arguments.eviction = arguments.eviction or ["lru", "lrfu"]
    logging.disable_progress_bar()
    load = Load(mixtures(arguments.folder or cache_folder() / "mixtures", arguments.experts + SPARE), arguments)
    result: dict[str, Any] = {"experts_of_a_domain_that_differ": round(load.different(), 3)}
    if arguments.quiet:
        result["quiet"] = load.quiet()
    result["churn"] = load.churn()
    faults = [fault for part in result.values() if isinstance(part, dict) for fault in part.pop("faults")]
    print(json.dumps(result | {"faults": len(faults)}, indent=None if arguments.json else 2))
    sys.exit("\n".join(faults[:10]) or None)


if __name__ == "__main__":
    main()
