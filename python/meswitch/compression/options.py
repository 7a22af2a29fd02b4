"""The options of a compress: one object for the library and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from meswitch.compression.presets import PRESETS, Preset, override_bits
from meswitch.reference import BITS

METHODS = ("preset", "auto")
Method: TypeAlias = Literal["preset", "auto"]


@dataclass(frozen=True)
class CompressOptions:
    """How a fine-tune is compressed.

    `preset`: a name in `PRESETS`, or a `Preset` of your own. `bits` (1, 2, 3, 4 or 8) overrides it for every site,
    `embedding_bits` for embeddings and head. Method `auto` chooses bits, rank, groups and salient channels site by
    site instead, so that manifest and tensors take at most `target_bytes` or `bpw` bits a weight (either implies
    `auto`), or as much as the preset would. `compensate`: with calibration, choose codes so that later input channels
    make up for the errors of earlier ones (GPTQ, arXiv 2210.17323), where the preset's rules do.

    Raises `ValueError` for an unknown preset, method or number of bits, and for options that exclude each other.

    >>> CompressOptions(bpw=1.5).chooses_per_site
    True
    """

    preset: str | Preset = "default"
    bits: int | None = None
    embedding_bits: int | None = None
    method: Method = "preset"
    bpw: float | None = None
    target_bytes: int | None = None
    budget_bytes: int | None = None
    compensate: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.preset, str) and self.preset not in PRESETS:
            raise ValueError(f"expected a preset of {', '.join(PRESETS)}, found {self.preset!r}")
        if self.method not in METHODS:
            raise ValueError(f"expected a method of {', '.join(METHODS)}, found {self.method!r}")
        for bits in (self.bits, self.embedding_bits):
            if bits is not None and bits not in BITS:
                raise ValueError(f"expected 1, 2, 3, 4 or 8 bits, found {bits}")
        targets = [target for target in (self.bpw, self.target_bytes, self.budget_bytes) if target is not None]
        if len(targets) > 1:
            raise ValueError(f"expected bits a weight or bytes, found both: {', '.join(map(str, targets))}")
        if targets and not (0 < targets[0] < math.inf and (self.bpw is not None or targets[0] >= 1)):
            raise ValueError(f"expected a target above 0, found {targets[0]}")
        if self.chooses_per_site and (self.bits is not None or self.embedding_bits is not None):
            raise ValueError(
                "expected a target or numbers of bits, found both: "
                f"bits {self.bits}, embedding_bits {self.embedding_bits}"
            )

    @property
    def chooses_per_site(self) -> bool:
        """Whether the form of every site is chosen, within a target of bytes."""
        return self.method == "auto" or (self.bpw, self.target_bytes, self.budget_bytes) != (None, None, None)

    @property
    def label(self) -> str:
        """The preset's name, `custom` for a `Preset` of your own."""
        return self.preset if isinstance(self.preset, str) else "custom"

    @property
    def rules(self) -> Preset:
        """The preset with `bits` and `embedding_bits` applied."""
        preset = PRESETS[self.preset] if isinstance(self.preset, str) else self.preset
        return override_bits(preset, self.bits, self.embedding_bits)
