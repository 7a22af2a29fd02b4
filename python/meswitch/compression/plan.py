"""Plans: how each parameter is to be stored, by the preset and the module that owns it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from meswitch.compression.calibration import Calibration
from meswitch.compression.owners import Owner, Place, Role, parameter_owners
from meswitch.compression.presets import Preset, Rule
from meswitch.huggingface.checkpoint import HEAD, Checkpoint

_PYTHON_FIELDS = ("compensate", "frequent", "frequent_bits")  # of a rule: resolved here, unknown to the native half


@dataclass(frozen=True)
class Plan:
    """How one parameter is stored: by `rule`, or uncompressed if that is `None`.

    `row_bits`: rows with other bits than the rule's, as `(bits, row numbers in rising order)`; rows with 0 bits stay as
    the base has them. `transposed`: whether the parameter is stored `[in, out]`. `place`: its layer and MoE expert.
    """

    name: str
    role: Role = "block"
    transposed: bool = False
    rule: Rule | None = None
    row_bits: tuple[tuple[int, tuple[int, ...]], ...] = ()
    place: Place | None = None

    def to_native(self) -> dict[str, Any]:
        """The plan as the native half takes it.

        >>> Plan("model.norm.weight").to_native()
        {'name': 'model.norm.weight', 'transposed': False, 'bits': None}
        """
        fields: dict[str, Any] = {"name": self.name, "transposed": self.transposed, "bits": None}
        if self.place is not None:
            fields["owner"] = self.place
        if self.rule is not None:
            fields |= {key: value for key, value in asdict(self.rule).items() if key not in _PYTHON_FIELDS}
            fields["classes"] = [(bits, list(rows)) for bits, rows in self.row_bits]
        return fields


def make_plans(
    base: Checkpoint, finetune: Checkpoint, preset: Preset, calibration: Calibration | None
) -> Iterator[Plan]:
    """A plan for every parameter of the fine-tune, in the order in which the model runs them.

    `calibration` says which tokens are frequent; without one the tokenizer's order does.
    """
    names = set(finetune.names())
    if HEAD in base.names() and HEAD not in names and HEAD in finetune:
        names.add(HEAD)  # tied in the fine-tune only: as a head its embedding differs from the base's head
    owners = parameter_owners(finetune, names)
    unknown = Owner("block", transposed=False, order=(len(names) + len(owners), 0))
    for name in sorted(names, key=lambda name: (owners.get(name, unknown).order, _natural_order(name))):
        owner = owners.get(name, unknown)
        rule, shape = preset.rule(owner.role), finetune.shape(name)
        # The biases of MoE experts may be one tensor with a row for each; they are vectors all the same.
        is_vector = len(shape) < 2 or name.endswith("bias")
        if rule is None or is_vector or not finetune.dtype(name).is_floating_point:
            yield Plan(name, owner.role, owner.transposed, place=owner.place)
            continue
        by_token = owner.role in ("embedding", "head")
        row_bits = _frequent_rows(rule, shape[0], calibration) if by_token else ()
        yield Plan(name, owner.role, owner.transposed, rule, row_bits, owner.place)


def _natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key by which number 10 comes after number 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _frequent_rows(rule: Rule, rows: int, calibration: Calibration | None) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """`Plan.row_bits` of the most frequent tokens: by calibration, else by the tokenizer's order."""
    count = round(rule.frequent * rows)
    if count == 0 or rule.frequent_bits == rule.bits:
        return ()
    counts = torch.zeros(rows, dtype=torch.int64)
    if calibration is not None:
        calibrated = calibration.token_counts[:rows]
        counts[: len(calibrated)] = calibrated
    frequent = torch.argsort(counts, descending=True, stable=True)[:count]
    return ((rule.frequent_bits, tuple(sorted(frequent.tolist()))),)
