"""One parameter of a delta directory, as data. A site is of exactly one of four kinds.

    Site = SharedSite       the base, cast to its dtype at most: nothing is stored
         | ReplacedSite     stored uncompressed, in its own dtype
         | QuantizedSite    codes and scales, with salient channels and a low-rank part, or sparse entries
         | LowRankSite      two thin factors and nothing else (an imported LoRA)

`reference.py` defines what each of them computes. All of these are immutable, and nobody writes to their tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor


def matrix_shape(shape: Sequence[int], *, transposed: bool = False, added_rows: int = 0) -> tuple[int, int]:
    """`(out_features, in_features)` of the delta's matrix of a parameter of this shape.

    All axes but the last are rows. `transposed`: the parameter is stored `[in_features, out_features]` (GPT-2's
    `Conv1D`). `added_rows`: rows of a grown vocabulary, which the base does not have and the matrix leaves out.

    >>> matrix_shape((50260, 768), added_rows=3), matrix_shape((768, 2304), transposed=True), matrix_shape((768,))
    ((50257, 768), (2304, 768), (1, 768))
    """
    rows, columns = prod(shape[:-1]), shape[-1] if shape else 1
    if transposed:
        rows, columns = columns, rows
    return rows - added_rows, columns


def to_matrix(parameter: Tensor, *, transposed: bool = False) -> Tensor:
    """A parameter as the matrix `[out_features, in_features]` that `matrix_shape` describes, a view where possible."""
    matrix = parameter.reshape(-1, parameter.shape[-1] if parameter.dim() else 1)
    return matrix.T if transposed else matrix


def from_matrix(matrix: Tensor, shape: Sequence[int], *, transposed: bool = False) -> Tensor:
    """The inverse of `to_matrix`: a matrix as a parameter of this shape."""
    return (matrix.T if transposed else matrix).reshape(shape)


@dataclass(frozen=True)
class Part:
    """The rows of a site that share a bit width.

    `codes int32 [words]`: packed, see `reference.pack`. `scales float16 [groups, n]`. `rows int32 [n]`: their row
    numbers in rising order, `None` for all rows of the site. `zero`: the code that means 0, may be half-integer.
    `group_size`: how many columns share a scale, `None` for the whole row.
    """

    bits: int
    zero: float
    codes: Tensor
    scales: Tensor
    group_size: int | None = None
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        """The number of its rows, `n`."""
        return self.scales.shape[1]


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
    """The changed weights of a site as a list of entries: row after row, by rising columns.

    `starts int32 [out_features + 1]`: where the entries of each row begin, then their total number. `gaps uint8
    [entries]`: columns from the previous entry of the same row, for the first entry from column 0. `values float8_e5m2
    [entries]`: in units of `2**exponent`; entries of one column add up, and an entry of 0 bridges a gap above 255.
    `changed`: the number of weights that change, as the manifest has it.
    """

    starts: Tensor
    gaps: Tensor
    values: Tensor
    changed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Parameter:
    """What every kind of site has: the parameter's name, and the fine-tune's shape and dtype, as on disk.

    The delta is a matrix `[out_features, in_features]`, see `matrix_shape`. `nbytes`: bytes of the site's tensors on
    disk. `relative_error`: ‖Δ − Δ̂‖ / ‖Δ‖, `None` where it was not measured.
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
    def base_rows(self) -> int:
        """Length of the parameter's first axis without the rows of a grown vocabulary."""
        return (self.shape or (1,))[0] - self.added_rows

    @property
    def out_features(self) -> int:
        """Rows of the delta's matrix."""
        return matrix_shape(self.shape, transposed=self.transposed, added_rows=self.added_rows)[0]

    @property
    def in_features(self) -> int:
        """Columns of the delta's matrix."""
        return matrix_shape(self.shape, transposed=self.transposed)[1]

    @property
    def parameters(self) -> int:
        """The number of weights of the parameter."""
        return prod(self.shape)

    @property
    def bpw(self) -> float:
        """Bits per weight, everything of the site included."""
        return 8 * self.nbytes / max(self.parameters, 1)

    @property
    def bits(self) -> int | None:
        """The bit width that most rows have; `None` for a site without codes."""
        return None

    @property
    def density(self) -> float | None:
        """The share of weights that changed, of a sparse site; `None` for any other."""
        return None


@dataclass(frozen=True, kw_only=True)
class SharedSite(_Parameter):
    """A parameter that is the base's own, cast to the fine-tune's dtype."""

    kind = "shared"


@dataclass(frozen=True, kw_only=True)
class ReplacedSite(_Parameter):
    """A parameter stored uncompressed: `value`, in the fine-tune's shape and dtype."""

    kind = "replaced"
    value: Tensor


@dataclass(frozen=True, kw_only=True)
class _DeltaSite(_Parameter):
    """A parameter stored as its difference from the base, in units of `2**exponent`.

    `added [added_rows, in_features]`: the rows of a grown vocabulary, uncompressed, in the fine-tune's dtype.
    """

    exponent: int = 0
    added: Tensor | None = None

    @property
    def added_rows(self) -> int:
        return 0 if self.added is None else self.added.shape[0]


@dataclass(frozen=True, kw_only=True)
class QuantizedSite(_DeltaSite):
    """A delta with codes of one or more bit widths, or with sparse entries.

    `column_scales float16 [in_features]` multiply the codes' part; `None` means all 1. `low_rank`, `salient` and
    `sparse` are added to it.
    """

    kind = "quantized"
    parts: tuple[Part, ...] = ()
    column_scales: Tensor | None = None
    salient: Salient | None = None
    low_rank: LowRank | None = None
    sparse: Sparse | None = None

    @property
    def bits(self) -> int | None:
        return max(self.parts, key=lambda part: part.count).bits if self.parts else None

    @property
    def density(self) -> float | None:
        return None if self.sparse is None else self.sparse.changed / max(self.parameters, 1)


@dataclass(frozen=True, kw_only=True)
class LowRankSite(_DeltaSite):
    """A delta that is a low-rank product and nothing else."""

    kind = "low_rank"
    low_rank: LowRank


DeltaSite: TypeAlias = QuantizedSite | LowRankSite
"""The kinds that are stored as a difference from the base."""

Site: TypeAlias = SharedSite | ReplacedSite | DeltaSite
