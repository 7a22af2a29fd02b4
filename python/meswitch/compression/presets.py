"""Presets: a rule for block linears, embeddings and the head each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """How the sites of one role are stored; docs/codec.md says what the codec does with it.

    `unbiased` scales keep a delta whole along itself, where least squares shrinks it. `compensate` lets what one input
    channel's code misses be made up for by the channels after it, where calibration says how they go together (GPTQ,
    arXiv 2210.17323). `frequent` is the share of rows,
    the most frequent tokens first, that take `frequent_bits` a code. `sparse` keeps changed weights one by one where
    that takes less than codes.
    """

    bits: int
    zero: Literal["symmetric", "level", "auto"] = "auto"
    group_size: int | None = None
    one_scale: bool = False
    column_scales: bool = True
    unbiased: bool = True
    compensate: bool = True
    salient: int = 0
    rank: int = 0
    frequent: float = 0.0
    frequent_bits: int = 4
    skip_unchanged_rows: bool = False
    sparse: bool = True


@dataclass(frozen=True)
class Preset:
    """A rule for block linears, embeddings and the head each; `None` means stored whole."""

    block: Rule
    embedding: Rule | None
    head: Rule | None

    def rule(self, role: str) -> Rule | None:
        """The rule for parameters of a role. Gates of MoE blocks are stored whole."""
        rules = {"block": self.block, "embedding": self.embedding, "head": self.head, "gate": None}
        return rules[role]


PRESETS = {
    "default": Preset(
        block=Rule(bits=2),
        embedding=Rule(bits=2, frequent=0.06, frequent_bits=4, skip_unchanged_rows=True),
        head=Rule(bits=2, rank=1, frequent=0.06, frequent_bits=4, skip_unchanged_rows=True),
    ),
    "small": Preset(
        block=Rule(bits=1),
        embedding=Rule(bits=1, frequent=0.2, frequent_bits=3, skip_unchanged_rows=True),
        head=Rule(bits=1, rank=1, frequent=0.2, frequent_bits=3, skip_unchanged_rows=True),
    ),
    # The two papers' own settings: embeddings and head stay at 16 bits there.
    "me-switch": Preset(
        block=Rule(
            bits=2, zero="level", column_scales=False, unbiased=False, compensate=False, salient=8, sparse=False
        ),
        embedding=None,
        head=None,
    ),
    "bitdelta": Preset(
        block=Rule(
            bits=1,
            zero="symmetric",
            one_scale=True,
            column_scales=False,
            unbiased=False,
            compensate=False,
            sparse=False,
        ),
        embedding=None,
        head=None,
    ),
}


def override_bits(preset: Preset, bits: int | None, embedding_bits: int | None) -> Preset:
    """The preset at other bit widths: every row of a site at the same one then."""

    def at(rule: Rule | None, width: int) -> Rule:
        one_scale = rule is not None and rule.one_scale
        return replace(rule or preset.block, bits=width, frequent=0.0, one_scale=one_scale)

    outer = embedding_bits if embedding_bits is not None else bits
    block = preset.block if bits is None else at(preset.block, bits)
    if outer is None:
        return replace(preset, block=block)
    return Preset(block, at(preset.embedding, outer), at(preset.head, outer))
