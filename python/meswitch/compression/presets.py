"""Presets: one rule each for block linears, embeddings and the head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """How the sites of one role are stored; docs/codec.md says what the codec does with it.

    `bits`: of a code. `zero`: the code that means 0, `symmetric` (2^bits − 1) / 2, `level` 2^(bits − 1), or `auto`,
    whichever suits the site better. `group_size`: columns that share a row's scale, `None` for all. `one_scale`: one
    scale for the whole matrix. `column_scales`: a scale for every column, too. `unbiased`: ⟨Δ̂, Δ⟩ = ⟨Δ, Δ⟩ in rows.
    `compensate`: with calibration, codes of later input channels make up for the errors of earlier ones (GPTQ, arXiv
    2210.17323). `salient`: input channels whose error is stored in 16 bits. `rank`: of a low-rank part. `frequent`: the
    share of rows, of the most frequent tokens, that take `frequent_bits` a code. `skip_unchanged_rows`: no codes for
    rows that are bit-equal. `sparse`: changed weights as a list of entries where that takes fewer bytes than codes.
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
    """The rules for block linears, embeddings and the head; `None` means stored uncompressed."""

    block: Rule
    embedding: Rule | None
    head: Rule | None

    def rule(self, role: str) -> Rule | None:
        """The rule for parameters of a role; `None` for the gates of MoE blocks, which are stored uncompressed."""
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
    # The settings of the two papers (arXiv 2406.09041 and 2402.10193), which leave embeddings and head at 16 bits.
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
    """The preset with other bit widths, the same for every row of a site; `None` leaves the preset's."""

    def with_bits(rule: Rule | None, width: int) -> Rule:
        one_scale = rule is not None and rule.one_scale
        return replace(rule or preset.block, bits=width, frequent=0.0, one_scale=one_scale)

    outer_bits = embedding_bits if embedding_bits is not None else bits
    block = preset.block if bits is None else with_bits(preset.block, bits)
    if outer_bits is None:
        return replace(preset, block=block)
    return Preset(block, with_bits(preset.embedding, outer_bits), with_bits(preset.head, outer_bits))
