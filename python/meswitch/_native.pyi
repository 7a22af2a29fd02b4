from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, final

from torch import Tensor

__all__ = [
    "Checkpoint",
    "Delta",
    "Folder",
    "Matrix",
    "Rows",
    "Table",
    "backend",
    "backends",
    "base_linear",
    "base_linear_tokens",
    "compress",
    "cpu_features",
    "estimate_bytes",
    "is_shared",
    "kernel_threads",
    "probe",
    "resolve_target",
    "row_energies",
    "tile",
    "write",
]

_Source = tuple[str, tuple[int, list[int]] | None]
_Part = tuple[int, float, int, Tensor | None, Tensor, Tensor]

@final
class Checkpoint:
    def __new__(cls, path: str | PathLike[str], files: Sequence[str]) -> Checkpoint: ...
    def with_parameters(self, parameters: dict[str, _Source], aliases: dict[str, _Source]) -> Checkpoint: ...
    def sample(self) -> str: ...
    def stored_names(self) -> list[str]: ...
    def names(self) -> list[str]: ...
    def has(self, name: str) -> bool: ...
    def source(self, name: str) -> tuple[Path, str, tuple[int, list[int]] | None] | None: ...
    def info(self, name: str) -> tuple[str, list[int]]: ...

@final
class Delta:
    def __new__(cls, path: str | PathLike[str]) -> Delta: ...
    @property
    def nbytes(self) -> int: ...
    def manifest(self) -> str: ...
    def extent(self, site: str, role: str) -> tuple[int, int] | None: ...
    def read_file(self, name: str) -> bytes: ...
    def verify(self) -> None: ...
    def rewrite(
        self,
        out: str | PathLike[str],
        tensors: dict[str, bytes],
        errors: dict[str, float],
        settings: str,
    ) -> None: ...
    def check_base(self, base: Checkpoint, whole: bool) -> None: ...

@final
class Folder:
    def __new__(cls, target: str | PathLike[str], replaces: str | None) -> Folder: ...
    @property
    def path(self) -> PathLike[str]: ...
    def commit(self) -> None: ...
    def close(self) -> None: ...

@final
class Matrix:
    def __new__(
        cls,
        rows: int,
        columns: int,
        exponent: int,
        parts: Sequence[_Part],
        column_scales: Tensor | None,
        salient: tuple[Tensor, Tensor] | None,
        low_rank: tuple[Tensor, Tensor] | None,
        sparse: tuple[Tensor, Tensor, Tensor] | None,
    ) -> Matrix: ...
    def delta_embedding(self, y: Tensor, tokens: Sequence[int], ids: Sequence[int], scale: float) -> None: ...
    def merged(self, weight: Tensor, start: int, out: Tensor) -> None: ...
    def dense(self, start: int, out: Tensor) -> None: ...

@final
class Rows:
    def __new__(cls, slots: Sequence[int]) -> Rows: ...

@final
class Table:
    def __new__(cls, rows: int, columns: int) -> Table: ...
    def set(self, slot: int, matrix: Matrix | None) -> None: ...
    def delta_linear(self, y: Tensor, x: Tensor, rows: Rows, exact: bool) -> None: ...

def compress(
    base: Checkpoint,
    finetune: Checkpoint,
    out: str | PathLike[str],
    plans: Sequence[dict[str, Any]],
    moments: dict[str, bytes],
    files: Sequence[str | PathLike[str]],
    settings: str,
    base_name: str,
    progress: Callable[[str, int, int], object],
    factor: Callable[[str], bytes | None] | None = None,
) -> None: ...
def estimate_bytes(
    base: Checkpoint,
    finetune: Checkpoint,
    plans: Sequence[dict[str, Any]],
    shared: set[str],
    files: Sequence[str | PathLike[str]],
    settings: str,
    base_name: str,
) -> int: ...
def is_shared(base: Checkpoint, finetune: Checkpoint, name: str) -> bool: ...
def resolve_target(path: str | PathLike[str], replaces: str | None) -> PathLike[str]: ...
def row_energies(
    base: Checkpoint, finetune: Checkpoint, name: str, transposed: bool, moments: bytes | None
) -> bytes: ...
def probe(
    base: Checkpoint,
    finetune: Checkpoint,
    name: str,
    transposed: bool,
    moments: bytes | None,
    rows: Sequence[int],
    candidates: Sequence[dict[str, Any]],
) -> list[bytes]: ...
def write(
    base: Checkpoint,
    out: str | PathLike[str],
    sites: Sequence[str],
    tensors: Callable[[str], Sequence[bytes]],
    files: Sequence[str | PathLike[str]],
    settings: str,
    base_name: str,
    progress: Callable[[str, int, int], object],
) -> None: ...
def checksum(bytes: bytes) -> str: ...
def tile(codes: Tensor, bits: int, columns: int, out: Tensor) -> None: ...
def base_linear(x: Tensor, sites: Sequence[tuple[Table, Tensor, Rows | None, Tensor]]) -> None: ...
def base_linear_tokens() -> int: ...
def backend() -> str: ...
def backends() -> list[str]: ...
def kernel_threads() -> tuple[int, bool]: ...
def cpu_features() -> dict[str, bool]: ...
