"""The last step of a tour: one batch of every expert's prompts, and the same batch on the base alone."""

from __future__ import annotations

import time
from typing import Any

from meswitch.demo.subject import Subject
from meswitch.engine.engine import Engine
from meswitch.progress import ProgressCallback, ProgressMeter
from meswitch.router.route import read_examples

SERVED_PRESET = "default"
NEW_TOKENS = 48
PROMPTS_PER_EXPERT = 2
TIMED_ROUNDS = 3  # the fastest counts


def serve_batch(subject: Subject, progress: ProgressCallback) -> dict[str, Any]:
    """Answers of the mixed batch and its tokens a second, beside those of the base, measured in turn."""
    prompts, labels = _mixed_batch(subject)
    routed = subject.prompts is not None
    meter = ProgressMeter(progress, "answering a mixed batch", 1 + 2 * TIMED_ROUNDS)
    meter.update(0)
    deltas = {name: subject.delta(SERVED_PRESET, name) for name in subject.experts}
    with Engine(subject.base, experts=deltas, router=subject.out / "router" if routed else None) as engine:
        answers = _answer(engine, subject, prompts, "auto" if routed else labels)  # also warms up
        meter.advance(1)
        batches = {"mixed": [answer.expert for answer in answers], "base": ["base"] * len(prompts)}
        speeds: dict[str, list[float]] = {name: [] for name in batches}
        for _ in range(TIMED_ROUNDS):
            for name, experts in batches.items():
                speeds[name].append(_tokens_per_second(engine, subject, prompts, experts))
                meter.advance(1)
    return {
        "requests": len(prompts),
        "mixed_tokens_per_second": max(speeds["mixed"]),
        "base_tokens_per_second": max(speeds["base"]),
        "answers": [
            {"prompt": prompt, "label": label, "expert": answer.expert, "text": answer.text}
            for prompt, label, answer in zip(prompts, labels, answers, strict=True)
        ],
    }


def _answer(engine: Engine, subject: Subject, prompts: list[str], expert: str | list[str]) -> list[Any]:
    if subject.chat:
        conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
        answers: list[Any] = engine.chat(conversations, expert=expert, max_new_tokens=NEW_TOKENS)
    else:
        answers = engine.generate(prompts, expert=expert, max_new_tokens=NEW_TOKENS)
    return answers


def _tokens_per_second(engine: Engine, subject: Subject, prompts: list[str], experts: list[str]) -> float:
    started = time.perf_counter()
    answers = _answer(engine, subject, prompts, experts)
    return sum(len(answer.token_ids) for answer in answers) / (time.perf_counter() - started)


def _mixed_batch(subject: Subject) -> tuple[list[str], list[str]]:
    """Prompts and their experts: the first held-out ones of each expert, or one sentence for all."""
    if subject.heldout_prompts is None:
        labels = [name for name in subject.experts for _ in range(PROMPTS_PER_EXPERT)]
        return ["Write one sentence about the sea."] * len(labels), labels
    examples = read_examples(subject.heldout_prompts)
    chosen = [
        example
        for name in subject.experts
        for example in [e for e in examples if e.expert == name][:PROMPTS_PER_EXPERT]
    ]
    return [example.prompt for example in chosen], [example.expert for example in chosen]
