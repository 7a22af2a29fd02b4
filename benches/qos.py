"""Several fine-tunes of one mixture of experts on one machine: how long requests take, by how they are served.

    python benches/qos.py --base DIR --experts DIR --models NAME=DIR ... [--rate 0.5] [--seconds 60] [--tokens 32]
                          [--way deltas --way swapped]

Requests for each model arrive by a Poisson process of the same rate, with prompts of 8 to 48 tokens and answers of
`--tokens`. Served by

    deltas     one engine: base, and a delta for each model, all in one batch
    alone      each model in an engine of its own, by itself on the machine: what its requests would see without others
    swapped    one model in memory, whole models loaded in turn; requests of the loaded one first
    split      all models in memory, an engine each, which share the processor: an emulation of a device that is split
               into instances (MIG)

*Turnaround*: from arrival to the last token; *waiting*: from arrival to the first token less the time that it takes
when nothing waits. All arrivals, prompts and their order are the same for every way.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from meswitch.engine.engine import Engine

SETTINGS: dict[str, Any] = {"kv_budget": "128MiB"}


@dataclass(frozen=True)
class Arrival:
    """A request: when it arrives after the start, in seconds, for which model, with which tokens."""

    at: float
    model: str
    prompt: tuple[int, ...]


@dataclass
class Times:
    """Seconds from arrival to the first token and to the last, of every request, by model."""

    first: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, list[float]] = field(default_factory=dict)
    elapsed: float = 0.0


Serve = Callable[[Arrival], tuple[float, float]]
"""Answers a request; returns when the first and the last token came, by `time.perf_counter`."""


def arrivals(models: list[str], rate: float, seconds: float, vocabulary: int, seed: int) -> list[Arrival]:
    """Requests of every model, in order of arrival."""
    draw, found = random.Random(seed), []
    for model in models:
        at = draw.expovariate(rate)
        while at < seconds:
            length = draw.randrange(8, 49)
            found.append(Arrival(at, model, tuple(draw.randrange(10, vocabulary) for _ in range(length))))
            at += draw.expovariate(rate)
    return sorted(found, key=lambda arrival: arrival.at)


def play(requests: list[Arrival], serve: Serve) -> Times:
    """Sends every request when it arrives, whatever has become of the others."""
    times, lock, start = Times(), threading.Lock(), time.perf_counter()

    def run(arrival: Arrival) -> None:
        first, last = serve(arrival)
        with lock:
            times.first.setdefault(arrival.model, []).append(first - start - arrival.at)
            times.last.setdefault(arrival.model, []).append(last - start - arrival.at)

    with ThreadPoolExecutor(max_workers=len(requests)) as pool:
        running: list[Future[None]] = []
        for arrival in requests:
            time.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            running.append(pool.submit(run, arrival))
        for future in running:
            future.result()
    times.elapsed = time.perf_counter() - start
    return times


def by_engine(engine: Engine, tokens: int, expert: str | None = None) -> Serve:
    def serve(arrival: Arrival) -> tuple[float, float]:
        stream = engine.stream(list(arrival.prompt), expert=expert or arrival.model, max_new_tokens=tokens)
        first = 0.0
        for _ in stream:
            first = first or time.perf_counter()
        last = time.perf_counter()
        return first or last, last

    return serve


@contextmanager
def deltas(base: Path, experts: Path, tokens: int) -> Iterator[Serve]:
    with Engine(base, experts=experts, **SETTINGS) as engine:
        for name in engine.experts:
            engine.pin(name)
            engine.generate([10, 11, 12], expert=name, max_new_tokens=2)
        yield by_engine(engine, tokens)


@contextmanager
def alone(model: Path, tokens: int) -> Iterator[Serve]:
    with Engine(model, **SETTINGS) as engine:
        engine.generate([10, 11, 12], expert="base", max_new_tokens=2)
        yield by_engine(engine, tokens, "base")


@contextmanager
def split(models: dict[str, Path], tokens: int) -> Iterator[Serve]:
    """An engine for each model, all at once."""
    with ExitStack() as stack:
        engines = {name: stack.enter_context(Engine(path, **SETTINGS)) for name, path in models.items()}
        serves = {name: by_engine(engine, tokens, "base") for name, engine in engines.items()}
        for engine in engines.values():
            engine.generate([10, 11, 12], expert="base", max_new_tokens=2)
        yield lambda arrival: serves[arrival.model](arrival)


class Swapped:
    """One whole model in memory at a time: requests of the loaded one first, then the model that was asked first."""

    def __init__(self, models: dict[str, Path], tokens: int) -> None:
        self._models, self._tokens, self._loaded = models, tokens, ""
        self._waiting: list[tuple[Arrival, Future[tuple[float, float]]]] = []
        self._changed, self._closed, self.loads = threading.Condition(), False, 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __call__(self, arrival: Arrival) -> tuple[float, float]:
        future: Future[tuple[float, float]] = Future()
        with self._changed:
            self._waiting.append((arrival, future))
            self._changed.notify()
        return future.result()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        model: Any = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if not self._waiting:
                    return
                own = [one for one in self._waiting if one[0].model == self._loaded]
                name = self._loaded if own else self._waiting[0][0].model
                batch = [one for one in self._waiting if one[0].model == name]
                self._waiting = [one for one in self._waiting if one[0].model != name]
            if name != self._loaded:
                model = None  # its memory first
                model = AutoModelForCausalLM.from_pretrained(self._models[name]).eval()
                self._loaded, self.loads = name, self.loads + 1
            self._answer(model, batch)

    @torch.inference_mode()
    def _answer(self, model: Any, batch: list[tuple[Arrival, Future[tuple[float, float]]]]) -> None:
        longest = max(len(arrival.prompt) for arrival, _ in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (arrival, _) in enumerate(batch):
            ids[row, longest - len(arrival.prompt) :] = torch.tensor(arrival.prompt)
            mask[row, longest - len(arrival.prompt) :] = 1
        first: list[float] = []

        def note(_ids: Any, _scores: Any) -> Any:
            first.append(time.perf_counter())
            return torch.zeros(len(batch), dtype=torch.bool)

        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self._tokens,
            min_new_tokens=self._tokens,
            do_sample=False,
            stopping_criteria=[note],
        )
        for _, future in batch:
            future.set_result((first[0], time.perf_counter()))


@contextmanager
def swapped(models: dict[str, Path], tokens: int) -> Iterator[Serve]:
    served = Swapped(models, tokens)
    try:
        yield served
    finally:
        served.close()
        print(f"swapped: {served.loads} loads", flush=True)


def summary(times: Times, tokens: int) -> dict[str, float]:
    last = [value for values in times.last.values() for value in values]
    first = [value for values in times.first.values() for value in values]
    return {
        "requests": len(last),
        "turnaround_mean": round(statistics.fmean(last), 3),
        "turnaround_p95": round(statistics.quantiles(last, n=20)[-1], 3),
        "first_token_mean": round(statistics.fmean(first), 3),
        "without_wait": round(statistics.fmean(b - a for a, b in zip(first, last, strict=True)), 3),
        "tokens_per_second": round(len(last) * tokens / times.elapsed, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="what the deltas are made against")
    parser.add_argument("--experts", type=Path, required=True, help="a delta directory for each model")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR", help="the whole fine-tunes")
    parser.add_argument("--rate", type=float, default=0.5, help="requests a second of each model")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", action="append", choices=["deltas", "alone", "swapped", "split"])
    arguments = parser.parse_args()
    models = {name: Path(folder) for name, _, folder in (text.partition("=") for text in arguments.models)}
    vocabulary = json.loads((next(iter(models.values())) / "config.json").read_text())["vocab_size"]
    requests = arrivals(list(models), arguments.rate, arguments.seconds, vocabulary, arguments.seed)
    tokens = arguments.tokens
    for way in arguments.way or ["deltas", "alone", "swapped", "split"]:
        if way == "alone":
            found = Times()
            for name, folder in models.items():
                with alone(folder, tokens) as serve:
                    times = play([one for one in requests if one.model == name], serve)
                found.first |= times.first
                found.last |= times.last
                found.elapsed += times.elapsed
        else:
            ways = {
                "deltas": lambda: deltas(arguments.base, arguments.experts, tokens),
                "swapped": lambda: swapped(models, tokens),
                "split": lambda: split(models, tokens),
            }
            with ways[way]() as serve:
                found = play(requests, serve)
        print(json.dumps({"way": way, **summary(found, tokens)}), flush=True)


if __name__ == "__main__":
    main()
