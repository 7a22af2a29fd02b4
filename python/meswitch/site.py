"""What a delta directory holds of one parameter, as data: a site is of exactly one of four kinds.

    Site = SharedSite       bit-equal to the base: nothing is stored
         | ReplacedSite     stored whole, in its own dtype
         | QuantizedSite    codes and scales, salient channels, a low-rank part, or changed weights one by one
         | LowRankSite      two thin factors alone (an imported LoRA)

`reference.py` says what each of them computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The rows of a site that share a bit width.

    `codes int32 [words]` (packed, see `reference.pack`), `scales float16 [n, groups]`, `rows int32 [n]` in rising
    order, or `None` for all rows of the site.
    """

    bits: int
    zero: float
    codes: Tensor
    scales: Tensor
    group_size: int | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Salient:
    """Input channels whose quantization error is kept: `index int32 [k]`, `values float16 [out_features, k]`."""

    index: Tensor
    values: Tensor


@dataclass(frozen=True)
class LowRank:
    """Two factors whose product is added: `u float16 [out_features, rank]`, `v float16 [rank, in_features]`."""

    u: Tensor
    v: Tensor


@dataclass(frozen=True)
class Sparse:
    """The changed weights of a site, one by one: row after row, by rising columns.

    `starts int32 [out_features + 1]`: where each row's entries begin, and the last one's end. `gaps uint8 [entries]`:
    columns between an entry and the one before it in its row, from column 0 to the first. `values float8_e5m2
    [entries]`: in units of `2**exponent`; entries of one column add up, a value of 0 bridges a gap above 255.
    `changed`: how many weights they change, as the manifest says.
    """

    starts: Tensor
    gaps: Tensor
    values: Tensor
    changed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    """What every kind of site has: a name, and the fine-tune's own shape and dtype, as on disk.

    The delta is a matrix `[out_features, in_features]`: the parameter, transposed where `transposed` says so (GPT-2's
    `Conv1D`), without the rows of a grown vocabulary. `nbytes` is what the site weighs on disk.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    nbytes: int = 0
    relative_error: float | None = None

    kind: ClassVar[str]

    @property
    def added_rows(self) -> int:
        """Rows of a grown vocabulary, which the base does not have."""
        return 0

    @property
    def out_features(self) -> int:
        """Rows of the delta's matrix."""
        shape = self.shape or (1,)
        return (shape[-1] if self.transposed else prod(shape[:-1])) - self.added_rows

    @property
    def in_features(self) -> int:
        """Columns of the delta's matrix."""
        shape = self.shape or (1,)
        return prod(shape[:-1]) if self.transposed else shape[-1]

    @property
    def parameters(self) -> int:
        """How many weights the parameter has."""
        return prod(self.shape)

    @property
    def bpw(self) -> float:
        """Bits per weight, everything included."""
        return 8 * self.nbytes / max(self.parameters, 1)

    @property
    def bits(self) -> int | None:
        """The bit width of most rows; `None` where there are no codes."""
        return None

    @property
    def density(self) -> float | None:
        """The share of weights that changed, where they are stored one by one; `None` elsewhere."""
        return None


@dataclass(frozen=True, kw_only=True)
class SharedSite(_Parameter):
    """A parameter that the fine-tune left as it is in the base, bit for bit."""

    kind = "shared"


@dataclass(frozen=True, kw_only=True)
class ReplacedSite(_Parameter):
    """A parameter stored whole: `value`, in the fine-tune's shape and dtype."""

    kind = "replaced"
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class _DeltaSite(_Parameter):
    """A parameter stored as its difference from the base, in units of `2**exponent`.

    `added [rows, in_features]` are the rows of a grown vocabulary, whole, in the fine-tune's dtype.
    """

    exponent: int = 0
    added: Tensor | None = None

    @property
    def added_rows(self) -> int:
        return 0 if self.added is None else self.added.shape[0]


@dataclass(frozen=True, kw_only=True)
class QuantizedSite(_DeltaSite):
    """Codes of one or more bit widths; `column_scales float16 [in_features]` multiply them, `None` counting as 1.

    What `low_rank`, `salient` and `sparse` stand for is added to the codes' part.
    """

    kind = "quantized"
    parts: tuple[Part, ...] = ()
    column_scales: Tensor | None = None
    salient: Salient | None = None
    low_rank: LowRank | None = None
    sparse: Sparse | None = None

    @property
    def bits(self) -> int | None:
        return max(self.parts, key=lambda part: len(part.scales)).bits if self.parts else None

    @property
    def density(self) -> float | None:
        return None if self.sparse is None else self.sparse.changed / max(self.parameters, 1)


@dataclass(frozen=True, kw_only=True)
class LowRankSite(_DeltaSite):
    """A low-rank part alone."""

    kind = "low_rank"
    low_rank: LowRank


DeltaSite: TypeAlias = QuantizedSite | LowRankSite
"""The kinds that have a delta of their own."""

Site: TypeAlias = SharedSite | ReplacedSite | DeltaSite
