"""A delta directory: open it, look into it, verify it, and rebuild the fine-tune's parameters from it.

    Delta ── sites ── Site ── parts ── Part      rows of one bit width
      │                 └ column_scales, salient, u·v, sparse, whole, added
      └ manifest (meswitch.json), tensors (delta.safetensors), both laid out in docs/format.md

Every tensor is a view of the mapped file: no copy until a kernel reads it. Never write to one. Only the codes of format
versions 1 and 2 are copied at opening, into the order of version 3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch import _native, reference
from meswitch.checkpoint import DTYPES, Checkpoint

TENSORS = "delta.safetensors"


@dataclass(frozen=True)
class Part:
    """The rows of a site that share a bit width.

    `codes int32 [words]` (tiled, see `reference.pack`), `scales float16 [n, groups]`, `rows int32 [n]` in rising order,
    or none for all rows of the site.
    """

    bits: int
    zero: float
    codes: Tensor
    scales: Tensor
    group_size: int | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Sparse:
    """The changed weights of a site, one by one: row after row, by rising columns.

    `starts int32 [out_features + 1]`: where each row's entries begin, and the last one's end. `gaps uint8 [entries]`:
    columns between an entry and the one before it in its row, from column 0 to the first. `values float8_e5m2
    [entries]`: in units of `2**exponent`; entries of one column add up, a value of 0 bridges a gap above 255.
    `changed`: weights that they change, as the manifest says.
    """

    starts: Tensor
    gaps: Tensor
    values: Tensor
    changed: int = 0


@dataclass(frozen=True)
class Site:
    """One parameter of the base that the fine-tune changed, by its name in the checkpoint.

    `shape` and `dtype` are the fine-tune's own, as on disk. The delta itself is a matrix `[out_features, in_features]`:
    the parameter, transposed where `transposed` says so (GPT-2's `Conv1D`), without the rows of a grown vocabulary.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    parts: tuple[Part, ...] = ()
    column_scales: Tensor | None = None
    salient_index: Tensor | None = None
    salient: Tensor | None = None
    u: Tensor | None = None
    v: Tensor | None = None
    sparse: Sparse | None = None
    added: Tensor | None = None
    whole: Tensor | None = None
    exponent: int = 0
    nbytes: int = 0
    relative_error: float | None = None

    @property
    def out_features(self) -> int:
        """Rows of the delta's matrix, without those of a grown vocabulary."""
        shape = self.shape or (1,)
        rows = shape[-1] if self.transposed else prod(shape[:-1])
        return rows - (0 if self.added is None else self.added.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the delta's matrix."""
        shape = self.shape or (1,)
        return prod(shape[:-1]) if self.transposed else shape[-1]

    @property
    def parameters(self) -> int:
        return prod(self.shape)

    @property
    def bpw(self) -> float:
        """Bits a weight, everything included."""
        return 8 * self.nbytes / max(self.parameters, 1)

    @property
    def bits(self) -> int | None:
        """The bit width of most rows."""
        return max(self.parts, key=lambda part: len(part.scales)).bits if self.parts else None

    @property
    def density(self) -> float | None:
        """The share of weights that changed, where they are stored one by one."""
        return None if self.sparse is None else self.sparse.changed / max(self.parameters, 1)

    def dense(self) -> Tensor:
        """Δ̂ as `float32 [out_features, in_features]`; zeros where the site is `shared`."""
        if self.kind == "replaced":
            raise ValueError(f"a replaced site has no delta of its own: {self.name}")
        return reference.dense(self)

    def served(self, base: Tensor) -> Tensor:
        """The expert's parameter on `base`: base and delta added in float32, other parameters as they are stored."""
        if self.whole is not None:
            return self.whole
        if self.kind == "shared":
            return base.to(self.dtype)
        delta = self.dense()
        if self.transposed:
            delta = delta.T
        known = base[: delta.shape[0]].float() if base.dim() == 2 else base.float()
        weight = known + delta.view(known.shape)
        return weight if self.added is None else torch.cat([weight, self.added.float()])

    def restore(self, base: Tensor) -> Tensor:
        """The fine-tune's parameter rebuilt on `base`, in the fine-tune's shape and dtype."""
        return self.served(base).to(self.dtype)

    def rebuild(self, base: Checkpoint, *, rounded: bool = True) -> Tensor:
        """`restore`, or `served` unless `rounded`, on the base's own parameter, which only a replaced site can do
        without. May be a mapped view."""
        if self.whole is not None:
            return self.whole
        own = base.tensor(self.name)
        return self.restore(own) if rounded else self.served(own)


class Delta:
    """An opened delta directory.

    Opening checks manifest, sizes, names, dtypes and shapes; `verify` reads every byte.
    Raises `FormatError` or `ChecksumError` for what is not a sound delta directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._native = _native.Delta(path)
        self.manifest: dict[str, Any] = json.loads(self._native.manifest())
        size = self.manifest["files"][TENSORS]["bytes"]
        # A private mapping: torch asks for writable memory, and nothing written would reach the file.
        self._bytes: Tensor | None = torch.from_file(str(path / TENSORS), shared=False, size=size, dtype=torch.uint8)
        self.sites: dict[str, Site] = {entry["name"]: self._site(entry) for entry in self.manifest["sites"]}

    @classmethod
    def open(cls, path: str | Path) -> Delta:
        return cls(Path(path))

    @property
    def fingerprint(self) -> str:
        """Of the base that the delta was made against."""
        fingerprint: str = self.manifest["base"]["fingerprint"]
        return fingerprint

    @property
    def nbytes(self) -> int:
        """What manifest and tensors weigh."""
        return self._native.nbytes

    @property
    def parameters(self) -> int:
        return sum(site.parameters for site in self.sites.values())

    @property
    def bpw(self) -> float:
        """Bits a weight over all parameters, everything included."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def verify(self, base: str | Path | Checkpoint | None = None) -> None:
        """Reads every byte of the directory, and of the base where one is given.

        Raises `ChecksumError` or `FormatError` for the first thing that is not sound, `BaseMismatchError` for a wrong
        base.
        """
        self._native.verify()
        if base is not None:
            self._native.check_base(_as_checkpoint(base).native, True)

    def check_base(self, base: str | Path | Checkpoint) -> None:
        """The quick check: names, shapes, dtypes and a few bytes of each tensor. Raises `BaseMismatchError`."""
        self._native.check_base(_as_checkpoint(base).native, False)

    def close(self) -> None:
        """Lets go of the mapping; tensors taken from it keep it alive."""
        self._bytes = None
        self.sites = {}

    def inspect(self) -> dict[str, Any]:
        """What the directory holds, as `meswitch inspect --json` prints it; sparse sites alone have a `density`."""
        kinds: dict[str, dict[str, int]] = {}
        for site in self.sites.values():
            kind = kinds.setdefault(site.kind, {"sites": 0, "parameters": 0, "bytes": 0})
            kind["sites"] += 1
            kind["parameters"] += site.parameters
            kind["bytes"] += site.nbytes
        return {
            "format_version": self.manifest["format_version"],
            "base_fingerprint": self.fingerprint,
            "base": self.manifest["base"]["name"],
            "settings": self.manifest["settings"],
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "bpw": self.bpw,
            "kinds": kinds,
            "sites": [
                {
                    "name": site.name,
                    "kind": site.kind,
                    "shape": list(site.shape),
                    "bits": site.bits,
                    "bpw": site.bpw,
                    "bytes": site.nbytes,
                    "relative_error": site.relative_error,
                    **({} if site.density is None else {"density": site.density}),
                }
                for site in self.sites.values()
            ],
        }

    def _site(self, entry: dict[str, Any]) -> Site:
        name, dtype = entry["name"], DTYPES[entry["dtype"]]
        out, columns = _matrix(entry)
        rank, salient = entry.get("rank", 0), entry.get("salient", 0)

        def tensor(role: str, dtype: torch.dtype, *shape: int) -> Tensor | None:
            return self._tensor(name, role, dtype, shape)

        parts = []
        for at, part in enumerate(entry.get("parts", [])):
            rows, size = part.get("rows", out), part.get("group_size")
            groups = 1 if size is None else -(-columns // size)
            codes = tensor(f"codes.{at}", torch.int32, -1)
            scales = tensor(f"scales.{at}", torch.float16, rows, groups)
            assert codes is not None and scales is not None  # the native half has checked that they are there
            if not part.get("tiled", False):
                codes = _tiled(codes, part["bits"], rows, columns)
            own = tensor(f"rows.{at}", torch.int32, rows)
            parts.append(Part(part["bits"], part["zero"], codes, scales, size, own))
        return Site(
            name=name,
            kind=entry["kind"],
            shape=tuple(entry["shape"]),
            dtype=dtype,
            transposed=entry.get("transposed", False),
            parts=tuple(parts),
            column_scales=tensor("column_scales", torch.float16, columns),
            salient_index=tensor("salient_index", torch.int32, salient),
            salient=tensor("salient", torch.float16, out, salient),
            u=tensor("u", torch.float16, out, rank),
            v=tensor("v", torch.float16, rank, columns),
            sparse=self._sparse(name, out, entry.get("sparse")),
            added=tensor("added", dtype, entry.get("added", 0), columns),
            whole=tensor("whole", dtype, *entry["shape"]),
            exponent=entry.get("exponent", 0),
            nbytes=entry["bytes"],
            relative_error=entry["relative_error"],
        )

    def _sparse(self, name: str, out: int, told: dict[str, int] | None) -> Sparse | None:
        if told is None:
            return None
        roles = (("starts", torch.int32, out + 1), ("gaps", torch.uint8, -1), ("values", torch.float8_e5m2, -1))
        tensors = [self._tensor(name, f"sparse_{role}", dtype, (length,)) for role, dtype, length in roles]
        starts, gaps, values = (tensor for tensor in tensors if tensor is not None)
        return Sparse(starts, gaps, values, told["changed"])

    def _tensor(self, site: str, role: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor | None:
        extent = self._native.extent(site, role)
        if extent is None or self._bytes is None:
            return None
        return self._bytes[extent[0] : extent[1]].view(dtype).view(shape)


def _tiled(old: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """A copy of codes that lie row after row, as in versions 1 and 2."""
    codes = torch.empty(reference.part_bytes(bits, rows, columns) // 4, dtype=torch.int32)
    _native.tile((old.data_ptr(), old.nbytes), bits, columns, (codes.data_ptr(), codes.nbytes))
    return codes


def _matrix(entry: dict[str, Any]) -> tuple[int, int]:
    """Output and input channels of the delta's matrix, without added rows."""
    shape = entry["shape"] or [1]
    rows, columns = prod(shape[:-1]), shape[-1]
    if entry.get("transposed", False):
        rows, columns = columns, rows
    return rows - entry.get("added", 0), columns


def _as_checkpoint(base: str | Path | Checkpoint) -> Checkpoint:
    return base if isinstance(base, Checkpoint) else Checkpoint.open(base)
