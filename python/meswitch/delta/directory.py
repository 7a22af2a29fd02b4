"""An opened delta directory: its sites, and whether its files are intact.

Delta ── sites ── Site (one of four kinds, see `meswitch.site`)
  └ manifest (meswitch.json), tensors (delta.safetensors), both laid out in docs/format.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from meswitch import _native
from meswitch.delta.entry import site_of
from meswitch.huggingface.checkpoint import Checkpoint, as_checkpoint
from meswitch.site import Site
from meswitch.target import TargetLock, lock_target

MANIFEST, TENSORS = "meswitch.json", "delta.safetensors"


class Delta:
    """An opened delta directory; any thread may use it.

    It holds the manifest and the open file of tensors, but no tensors, so an idle one costs some kilobytes. A directory
    that is replaced or removed does no harm; one whose file is changed in place raises `ChecksumError` when it is read.

    `path`: the directory. `sites`: every parameter of the fine-tune by name, in the order in which the model runs them;
    each look-up reads that site's tensors into memory and checks them. `outline`: the same with tensors on torch's
    meta device, which have shapes and dtypes and no content. `load` reads all sites at once. Tensors are in the order
    of today's format whatever the directory's version, and must not be written to.

    Opening checks the manifest, and the names, dtypes, shapes and sizes of tensors; `verify` reads every byte.
    Raises `FormatError` or `ChecksumError` for a directory that is not a valid delta directory.

    >>> delta = Delta.open("experts/math")
    >>> delta.verify("base/")
    >>> delta.sites["lm_head.weight"].kind, delta.sites["model.norm.weight"].kind
    ('quantized', 'replaced')
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._native: _native.Delta | None = _native.Delta(path)

    @classmethod
    def open(cls, path: str | Path) -> Delta:
        """The delta directory in `path`. Raises `FormatError`, `ChecksumError`, or `OSError` where there is none."""
        return cls(Path(path))

    @property
    def native(self) -> _native.Delta:
        """The native half. Raises `ValueError` once the delta is closed."""
        if self._native is None:
            raise ValueError(f"expected an open delta, found a closed one: {self.path}")
        return self._native

    @property
    def manifest(self) -> dict[str, Any]:
        """`meswitch.json`, parsed anew at every look-up."""
        manifest: dict[str, Any] = json.loads(self.native.manifest())
        return manifest

    @property
    def format_version(self) -> int:
        """The version of the format that the directory has."""
        return self.native.format_version

    @property
    def sites(self) -> Mapping[str, Site]:
        """Every parameter of the fine-tune; a look-up reads and checks its tensors."""
        return _Sites(self.native)

    @property
    def outline(self) -> dict[str, Site]:
        """Every parameter of the fine-tune, with tensors that have no content."""
        native = self.native
        return {name: site_of(_entry(native, name), _meta_tensor) for name in native.names()}

    def load(self) -> dict[str, Site]:
        """Reads and checks all tensors: one piece of memory of `memory_bytes`, kept while any tensor of it is alive."""
        return self.sites_of(self.native.tensors())

    def sites_of(self, tensors: _native.Tensors) -> dict[str, Site]:
        """All sites, over the tensors of this delta that were read before."""
        return {site.name: site for site in self.iterate(tensors)}

    def site_of(self, name: str, tensors: _native.Tensors) -> Site:
        """One site, over tensors of it that were read before."""
        return _site(_entry(self.native, name), tensors, from_dlpack(tensors.dlpack()))

    def iterate(self, tensors: _native.Tensors) -> Iterator[Site]:
        """`sites_of`, each made when it is asked for."""
        native, memory = self.native, from_dlpack(tensors.dlpack())
        return (_site(_entry(native, name), tensors, memory) for name in native.names())

    @property
    def kind(self) -> str:
        """`"delta"`, or `"base"` for a whole model in a few bits (`quantize`)."""
        return self.native.kind

    @property
    def fingerprint(self) -> str:
        """The hash of the base that the delta was made against."""
        return self.native.fingerprint

    @property
    def nbytes(self) -> int:
        """Bytes of manifest and tensors on disk."""
        return self.native.nbytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that `load` takes."""
        return self.native.memory_bytes

    @property
    def parameters(self) -> int:
        """The number of weights of the fine-tune."""
        return self.native.parameters

    @property
    def bpw(self) -> float:
        """Bits a weight over all parameters, manifest included."""
        return 8 * self.nbytes / max(self.parameters, 1)

    def verify(self, base: str | Path | Checkpoint | None = None) -> None:
        """Reads every byte of the directory, and of `base` (a folder or hub id) if given, and checks their hashes.

        Raises `ChecksumError` or `FormatError` for the first that differs, `BaseMismatchError` for another base.
        """
        self.native.verify()
        if base is not None:
            self.native.check_base(as_checkpoint(base).native, True, False)

    @property
    def files(self) -> dict[str, str]:
        """The checksums of the fine-tune's small files (config, tokenizer, …) by name."""
        return {name: entry["checksum"] for name, entry in self.manifest["files"].items() if name != TENSORS}

    def read_file(self, name: str) -> bytes:
        """One of `files`, as it was when the delta was opened.

        Raises `ChecksumError` where it has changed, `FormatError` where another directory has taken its place, and
        `OSError` where it is gone.

        >>> Delta.open("experts/math").read_file("config.json")[:1]
        b'{'
        """
        return self.native.read_file(name)

    def check_base(self, base: str | Path | Checkpoint, *, allow_quantized: bool = False) -> None:
        """Checks the base quickly: names, shapes, dtypes and a few bytes of each tensor.

        `allow_quantized`: a quantized form of the base will do. Raises `BaseMismatchError`.
        """
        self.native.check_base(as_checkpoint(base).native, False, allow_quantized)

    def rewrite(
        self,
        out: str | Path | TargetLock,
        tensors: Mapping[str, Tensor],
        errors: Mapping[str, float],
        settings: dict[str, Any],
    ) -> None:
        """Writes this delta to `out` with some tensors (by `SITE/ROLE`) and relative errors (by site) replaced.

        `settings` replace the manifest's. `out` may be this directory, or a lock that the caller has on the place.
        Raises `OutputError` for a path where something else is, or another process writes.
        """
        content = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
        with nullcontext(out) if isinstance(out, TargetLock) else lock_target(out, MANIFEST) as lock:
            self.native.rewrite(lock, content, dict(errors), json.dumps(settings))

    def upgrade(self) -> bool:
        """Writes the directory anew in today's format, in its own place; false, and nothing done, if it has it already.

        Every tensor and file is compared with its checksum on the way; a failure leaves the directory as it was. This
        object goes on reading the old files. Raises `ChecksumError`, and `OSError` if it cannot be written.
        """
        return self.native.upgrade()

    def close(self) -> None:
        """Closes the file. Tensors that were read stay as they are."""
        self._native = None

    def inspect(self) -> dict[str, Any]:
        """What `meswitch inspect --json` prints; only sparse sites have a `density`."""
        kinds: dict[str, dict[str, int]] = {}
        sites, manifest = self.outline.values(), self.manifest
        for site in sites:
            kind = kinds.setdefault(site.kind, {"sites": 0, "parameters": 0, "bytes": 0})
            kind["sites"] += 1
            kind["parameters"] += site.parameters
            kind["bytes"] += site.nbytes
        return {
            "format_version": manifest["format_version"],
            "kind": self.kind,
            "base_fingerprint": self.fingerprint,
            "base": manifest["base"]["name"],
            "settings": manifest["settings"],
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
                for site in sites
            ],
        }


class _Sites(Mapping[str, Site]):
    """The sites of a delta, each read when it is looked up."""

    def __init__(self, native: _native.Delta) -> None:
        self._native = native

    def __getitem__(self, name: str) -> Site:
        entry = _entry(self._native, name)
        tensors = self._native.tensors(name)
        return _site(entry, tensors, from_dlpack(tensors.dlpack()))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._native.site(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._native.names())

    def __len__(self) -> int:
        return len(self._native.names())


def _site(entry: dict[str, Any], tensors: _native.Tensors, memory: Tensor) -> Site:
    """A site whose tensors are views of `memory`, which holds those of `tensors`."""
    name = entry["name"]

    def read(role: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        extent = tensors.extent(name, role)
        assert extent is not None, f"{name}/{role}"  # the native half checked when it opened the directory
        return memory[extent[0] : extent[1]].view(dtype).view(*shape)

    return site_of(entry, read)


def _entry(native: _native.Delta, name: str) -> dict[str, Any]:
    text = native.site(name)
    if text is None:
        raise KeyError(name)
    entry: dict[str, Any] = json.loads(text)
    return entry


def _meta_tensor(role: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.empty([max(length, 0) for length in shape], dtype=dtype, device="meta")
