"""A route: which expert a prompt goes to. Also the labelled prompts a router learns from, and the report on one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch.errors import DataError, ExpertNameError
from meswitch.expert_name import BASE, check_name
from meswitch.huggingface.documents import json_lines, string_field, warn_of_unused

_FIELDS = {"prompt", "expert", "completion"}  # the last for those who also evaluate on the lines
_CONFIDENCE_BINS = 10


@dataclass(frozen=True)
class Route:
    """Where one prompt goes.

    `expert` is a name or `"base"`; `scores` are calibrated probabilities by label, and sum to 1; `abstained` says that
    no label was likely enough, or that the prompt is unlike any seen, so that it goes to the base.
    """

    expert: str
    scores: dict[str, float]
    abstained: bool

    @property
    def likeliest(self) -> str:
        """The label with the highest score, whether or not the prompt goes there."""
        return max(self.scores, key=self.scores.__getitem__)


@dataclass(frozen=True)
class Example:
    """A prompt and the expert it belongs to (or `"base"`)."""

    prompt: str
    expert: str


def read_examples(path: str | Path, known: Sequence[str] | None = None) -> list[Example]:
    """The lines `{"prompt": …, "expert": …}` of a `.jsonl` file.

    Every expert is a name that one may have, or `"base"`; with `known`, one of these or `"base"`. Raises `DataError`
    naming file and line. Warns of columns that are not used.
    """
    examples: list[Example] = []
    unused: set[str] = set()
    for where, line in json_lines(path):
        prompt, expert = string_field(line, "prompt", where), string_field(line, "expert", where)
        if not prompt.strip():
            raise DataError(f"expected a prompt, found an empty one: {where}")
        check_label(expert, where)
        if known is not None and expert not in known and expert != BASE:
            raise DataError(f"expected one of {', '.join([*known, BASE])}, found {expert!r}: {where}")
        examples.append(Example(prompt, expert))
        unused |= line.keys() - _FIELDS
    if not examples:
        raise DataError(f"expected labelled prompts, found none: {path}", hint='one {"prompt": …, "expert": …} a line')
    warn_of_unused(unused, path)
    return examples


def check_label(label: str, where: str) -> None:
    """Raises `DataError`, with `where` in its text, for a label that is neither `"base"` nor a name for an expert."""
    if label == BASE:
        return
    try:
        check_name(label)
    except ExpertNameError as error:
        raise DataError(
            f"{error.message}: {where}", hint=f"label prompts as their experts are named, or {BASE!r}"
        ) from error


def report(examples: Sequence[Example], routes: Sequence[Route]) -> dict[str, Any]:
    """`{accuracy, abstained, expected_calibration_error, per_expert, confusion, misrouted}`, shares as fractions.

    An abstained prompt counts as sent to the base. The calibration error is the likeliest label's, over ten bins of
    equal width, abstained or not. `confusion[label][sent]` counts prompts.

    >>> report([Example("1+1", "maths")], [Route("maths", {"maths": 1.0}, False)])["accuracy"]
    1.0
    """
    pairs = list(zip(examples, routes, strict=True))
    labels = sorted({e.expert for e in examples} | {r.expert for r in routes})
    confusion = {
        label: dict(sorted(Counter(r.expert for e, r in pairs if e.expert == label).items()))
        for label in sorted({e.expert for e in examples})
    }
    return {
        "accuracy": _share([e.expert == r.expert for e, r in pairs]),
        "abstained": _share([r.abstained for r in routes]),
        "expected_calibration_error": _calibration_error(pairs),
        "per_expert": {label: _label_row(label, pairs) for label in labels},
        "confusion": confusion,
        "misrouted": [_misroute(e, r) for e, r in pairs if e.expert != r.expert],
    }


def _misroute(example: Example, route: Route) -> dict[str, Any]:
    return {
        "prompt": example.prompt,
        "expert": example.expert,
        "sent": route.expert,
        "score": route.scores[route.likeliest],
        "abstained": route.abstained,
    }


def _label_row(label: str, pairs: Sequence[tuple[Example, Route]]) -> dict[str, Any]:
    """Counts and shares of one label: of its own prompts, and of the prompts sent to it."""
    routes = [r for e, r in pairs if e.expert == label]
    received = [e for e, r in pairs if r.expert == label]
    return {
        "prompts": len(routes),
        "recall": _share([r.expert == label for r in routes]) if routes else None,
        "precision": _share([e.expert == label for e in received]) if received else None,
        "abstained": _share([r.abstained for r in routes]) if routes else None,
    }


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else 0.0


def _calibration_error(pairs: Sequence[tuple[Example, Route]]) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for example, route in pairs:
        score = route.scores[route.likeliest]
        number = min(int(score * _CONFIDENCE_BINS), _CONFIDENCE_BINS - 1)
        bins.setdefault(number, []).append((score, route.likeliest == example.expert))
    gaps = [abs(sum(score - hit for score, hit in group)) for group in bins.values()]
    return sum(gaps) / max(len(pairs), 1)
