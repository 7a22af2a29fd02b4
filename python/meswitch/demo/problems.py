"""Generated word problems, "Question: …\\nAnswer: …", each worked and ending in its number."""

from __future__ import annotations

import random

_NAMES = "Ada Ben Carla Dan Elif Farid Grace Hugo Ines Jonas Kira Liam Mina Noor Omar Petra Ravi Sara Tom Yuki".split()
_THINGS = "apples books coins eggs flowers letters marbles oranges pencils plates shells stamps stones tickets".split()
_PLACES = "box bag basket drawer jar shelf".split()


def _gain(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b = r.randint(2, 60), r.randint(2, 39)
    verb = r.choice(("buys", "finds", "is given", "collects"))
    return (
        f"{name} has {a} {thing} and {verb} {b} more. How many {thing} does {name} have now?",
        f"{name} starts with {a} {thing} and adds {b}. {a} + {b} = {a + b}.",
        a + b,
    )


def _loss(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    b, c = r.randint(2, 39), r.randint(2, 60)
    verb = r.choice(("gives away", "loses", "sells"))
    return (
        f"{name} has {b + c} {thing} and {verb} {b} of them. How many {thing} are left?",
        f"{name} starts with {b + c} {thing} and takes away {b}. {b + c} - {b} = {c}.",
        c,
    )


def _times(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b, place = r.randint(2, 12), r.randint(2, 12), r.choice(_PLACES)
    return (
        f"{name} puts {b} {thing} into each {place} and fills {a} of them. How many {thing} is that?",
        f"There are {a} times {b} {thing}. {a} * {b} = {a * b}.",
        a * b,
    )


def _share(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b = r.randint(2, 9), r.randint(2, 12)
    return (
        f"{name} shares {a * b} {thing} equally among {a} friends. How many {thing} does each friend get?",
        f"Each friend gets one part in {a}. {a * b} / {a} = {b}.",
        b,
    )


def _two_steps(r: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b, c = r.randint(2, 9), r.randint(2, 9), r.randint(2, 20)
    return (
        f"{name} has {a} bags with {b} {thing} each, and {c} {thing} besides. How many {thing} does {name} have?",
        f"The bags hold {a} * {b} = {a * b} {thing}. With the others, {a * b} + {c} = {a * b + c}.",
        a * b + c,
    )


_TEMPLATES = (_gain, _loss, _times, _share, _two_steps)


def problems(rng: random.Random, count: int) -> list[str]:
    """`count` different problems, each "Question: …\\nAnswer: … The answer is N"."""
    by_question: dict[str, str] = {}
    while len(by_question) < count:
        question, work, number = rng.choice(_TEMPLATES)(rng, rng.choice(_NAMES), rng.choice(_THINGS))
        by_question[question] = f"Question: {question}\nAnswer: {work} The answer is {number}"
    return list(by_question.values())
