"""An opened delta directory: its sites, and whether its files are intact.

Delta ── sites ── Site (one of four kinds, see `meswitch.site`)
  └ manifest (meswitch.json), tensors (delta.safetensors), both laid out in docs/format.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch import _native, reference
from meswitch.huggingface.checkpoint import DTYPES, Checkpoint, as_checkpoint
from meswitch.site import (
    LowRank,
    LowRankSite,
    Part,
    QuantizedSite,
    ReplacedSite,
    Salient,
    SharedSite,
    Site,
    Sparse,
    matrix_shape,
)

MANIFEST, TENSORS = "meswitch.json", "delta.safetensors"


class Delta:
    """An opened delta directory; any thread may use it.

    `path`: the directory. `manifest`: `meswitch.json`, parsed. `sites`: every parameter of the fine-tune by name,
    in the order in which the model runs them. Their tensors are views of the mapped file, which must not be written to;
    only the codes of format versions 1 and 2 are copied, into the order of version 3.

    Opening checks the manifest, and the names, dtypes, shapes and sizes of tensors; `verify` reads every byte.
    Raises `FormatError` or `ChecksumError` for a directory that is not a valid delta directory.

    >>> delta = Delta.open("experts/math")
    >>> delta.verify("base/")
    >>> delta.sites["lm_head.weight"].kind, delta.sites["model.norm.weight"].kind
    ('quantized', 'replaced')
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
        """The delta directory in `path`. Raises `FormatError`, `ChecksumError`, or `OSError` where there is none."""
        return cls(Path(path))

    @property
    def fingerprint(self) -> str:
        """The hash of the base that the delta was made against."""
        fingerprint: str = self.manifest["base"]["fingerprint"]
        return fingerprint

    @property
    def nbytes(self) -> int:
        """Bytes of manifest and tensors."""
        return self._native.nbytes

    @property
    def parameters(self) -> int:
        """The number of weights of the fine-tune."""
        return sum(site.parameters for site in self.sites.values())

    @property
    def bpw(self) -> float:
        """Bits a weight over all parameters, manifest included."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def verify(self, base: str | Path | Checkpoint | None = None) -> None:
        """Reads every byte of the directory, and of `base` (a folder or hub id) if given, and checks their hashes.

        Raises `ChecksumError` or `FormatError` for the first that differs, `BaseMismatchError` for another base.
        """
        self._native.verify()
        if base is not None:
            self._native.check_base(as_checkpoint(base).native, True)

    @property
    def files(self) -> dict[str, str]:
        """The checksums of the fine-tune's small files (config, tokenizer, …) by name."""
        return {name: entry["checksum"] for name, entry in self.manifest["files"].items() if name != TENSORS}

    def read_file(self, name: str) -> bytes:
        """One of `files`, as it was written. Raises `ChecksumError` where it has changed, `OSError` where it is gone.

        >>> Delta.open("experts/math").read_file("config.json")[:1]
        b'{'
        """
        return self._native.read_file(name)

    def check_base(self, base: str | Path | Checkpoint) -> None:
        """Checks the base quickly: names, shapes, dtypes and a few bytes of each tensor. Raises `BaseMismatchError`."""
        self._native.check_base(as_checkpoint(base).native, False)

    def rewrite(
        self, out: str | Path, tensors: Mapping[str, Tensor], errors: Mapping[str, float], settings: dict[str, Any]
    ) -> None:
        """Writes this delta to `out` with some tensors (by `SITE/ROLE`) and relative errors (by site) replaced.

        `settings` replace the manifest's. `out` may be this directory.
        """
        content = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
        self._native.rewrite(out, content, dict(errors), json.dumps(settings))

    def close(self) -> None:
        """Drops all sites; the file stays mapped while a tensor of it is alive."""
        self._bytes = None
        self.sites = {}

    def inspect(self) -> dict[str, Any]:
        """What `meswitch inspect --json` prints; only sparse sites have a `density`."""
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
        name, dtype, kind = entry["name"], DTYPES[entry["dtype"]], entry["kind"]
        common: dict[str, Any] = {
            "name": name,
            "shape": tuple(entry["shape"]),
            "dtype": dtype,
            "transposed": entry.get("transposed", False),
            "nbytes": entry["bytes"],
            "relative_error": entry["relative_error"],
        }
        if kind == "shared":
            return SharedSite(**common)
        if kind == "replaced":
            return ReplacedSite(**common, value=self._tensor(name, "whole", dtype, entry["shape"]))
        rows, columns = matrix_shape(
            entry["shape"], transposed=entry.get("transposed", False), added_rows=entry.get("added", 0)
        )
        if entry.get("added", 0):
            common["added"] = self._tensor(name, "added", dtype, (entry["added"], columns))
        common["exponent"] = entry.get("exponent", 0)
        rank = entry.get("rank", 0)
        if rank:
            u = self._tensor(name, "u", torch.float16, (rows, rank))
            common["low_rank"] = LowRank(u, self._tensor(name, "v", torch.float16, (rank, columns)))
        if kind == "low_rank":
            return LowRankSite(**common)
        return QuantizedSite(
            **common,
            parts=tuple(self._part(entry, number, rows, columns) for number in range(len(entry.get("parts", [])))),
            column_scales=self._optional(name, "column_scales", torch.float16, (columns,)),
            salient=self._salient(name, rows, entry.get("salient", 0)),
            sparse=self._sparse(name, rows, entry.get("sparse")),
        )

    def _part(self, entry: dict[str, Any], number: int, out: int, columns: int) -> Part:
        name, part = entry["name"], entry["parts"][number]
        rows, group_size = part.get("rows", out), part.get("group_size")
        groups = 1 if group_size is None else -(-columns // group_size)
        codes = self._tensor(name, f"codes.{number}", torch.int32, (-1,))
        if not part.get("tiled", False):
            codes = _tiled(codes, part["bits"], rows, columns)
        scales = self._tensor(name, f"scales.{number}", torch.float16, (rows, groups))
        selected = self._optional(name, f"rows.{number}", torch.int32, (rows,))
        return Part(part["bits"], part["zero"], codes, scales, group_size, selected)

    def _salient(self, name: str, rows: int, count: int) -> Salient | None:
        if not count:
            return None
        index = self._tensor(name, "salient_index", torch.int32, (count,))
        return Salient(index, self._tensor(name, "salient", torch.float16, (rows, count)))

    def _sparse(self, name: str, rows: int, entry: dict[str, int] | None) -> Sparse | None:
        if entry is None:
            return None
        starts = self._tensor(name, "sparse_starts", torch.int32, (rows + 1,))
        gaps = self._tensor(name, "sparse_gaps", torch.uint8, (-1,))
        return Sparse(starts, gaps, self._tensor(name, "sparse_values", torch.float8_e5m2, (-1,)), entry["changed"])

    def _tensor(self, site: str, role: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A view of a tensor that must exist, as the native half checked when it opened the directory."""
        tensor = self._optional(site, role, dtype, shape)
        assert tensor is not None, f"{site}/{role}"
        return tensor

    def _optional(self, site: str, role: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor | None:
        """A view of a tensor; `None` if the site has none of this role."""
        extent = self._native.extent(site, role)
        if extent is None or self._bytes is None:
            return None
        return self._bytes[extent[0] : extent[1]].view(dtype).view(*shape)


def _tiled(codes_by_row: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """A tiled copy of codes that are stored row after row, as format versions 1 and 2 do."""
    codes = torch.empty(reference.part_bytes(bits, rows, columns) // 4, dtype=torch.int32)
    _native.tile(codes_by_row, bits, columns, codes)
    return codes
