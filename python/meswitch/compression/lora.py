"""A LoRA adapter of the peft package as an expert: its factors stay factors.

    W + scaling · B·A          low_rank: u = scaling · B, v = A, in 16 bits
    modules_to_save, biases    replaced (a grown vocabulary: its new rows alone)
    all else                   shared

`adapter.py` reads what peft wrote; what would change the arithmetic in any other way is refused there by name.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch import _native
from meswitch.compression.adapter import AdaptedBase, Adapter, is_transposed
from meswitch.compression.low_rank import Factors
from meswitch.delta.directory import Delta
from meswitch.delta.target import refuse_overwriting
from meswitch.errors import ArchitectureError, CheckpointError
from meswitch.huggingface.checkpoint import DTYPES, HEAD, Checkpoint, resolve
from meswitch.huggingface.files import TEMPLATE, VOCABULARY, matches, small_files
from meswitch.progress import Progress, ProgressCallback


@dataclass(frozen=True)
class ImportReport:
    """What an import made: the bytes of the delta's files, bits a weight, and the number of sites of each kind."""

    bytes: int
    bpw: float
    seconds: float
    low_rank: int
    replaced: int
    shared: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def import_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    progress: ProgressCallback | None = None,
) -> ImportReport:
    """Writes the delta directory of a LoRA adapter: `adapter_config.json` and `adapter_model.safetensors`.

    Both arguments are folders or hub ids. Tokenizer files and the chat template are the adapter's where it brings its
    own, the base's otherwise. An interrupted run leaves nothing at `out`; one that finishes replaces the delta
    directory that stood there.

    Raises `UnsupportedModelError` for what is not plain LoRA, `ArchitectureError` where it does not fit the base,
    `CheckpointError` for half an adapter, `NonFiniteError`; `OSError` where the disk says no.
    """
    start, target = time.perf_counter(), Path(out)
    refuse_overwriting(target)
    opened = AdaptedBase(Checkpoint.open(base))
    read = Adapter.open(resolve(adapter), opened)
    made, config = _sites(opened, read)

    def step(site: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("importing", done, total, site))

    with tempfile.TemporaryDirectory() as spare:
        files = _files(opened.checkpoint.path, read.folder)
        if config != opened.checkpoint.config:
            files["config.json"] = Path(spare) / "config.json"
            files["config.json"].write_text(json.dumps(config, indent=2) + "\n")
        _native.write(
            opened.checkpoint.native,
            target,
            [json.dumps(site.entry) for site in made.values()],
            lambda name: [_bytes(tensor) for tensor in made[name].tensors],
            [files[name] for name in sorted(files)],
            json.dumps({"adapter": "lora", **read.settings}),
            str(opened.checkpoint.config.get("_name_or_path") or opened.checkpoint.path.name),
            step,
        )
    delta, kinds = Delta.open(target), [site.entry["kind"] for site in made.values()]
    counts = {kind: kinds.count(kind) for kind in ("low_rank", "replaced", "shared")}
    counts["replaced"] += kinds.count("quantized")  # rows of a grown vocabulary alone
    return ImportReport(delta.nbytes, delta.bpw, time.perf_counter() - start, **counts)


@dataclass(frozen=True)
class _Site:
    """An entry of the manifest and its tensors, in the format's order."""

    entry: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)

    def same(self, other: _Site) -> bool:
        plain = {**self.entry, "name": None} == {**other.entry, "name": None}
        return plain and all(map(torch.equal, self.tensors, other.tensors))


def _sites(base: AdaptedBase, adapter: Adapter) -> tuple[dict[str, _Site], dict[str, Any]]:
    """A site for every parameter, in the order in which the model runs them, and the expert's config."""
    names, config = set(base.checkpoint.names()), dict(base.checkpoint.config)
    pair = [name for name in (base.embedding, base.head) if name is not None]
    if base.tied:
        names.add(HEAD)
    sites = {name: _site(base, adapter, name) for name in base.sorted(names)}
    if base.tied and sites[pair[0]].same(sites[HEAD]):
        del sites[HEAD]
    elif config.get("tie_word_embeddings", True) and any(sites[name].entry["kind"] != "shared" for name in pair):
        config["tie_word_embeddings"] = False
    _check_vocabulary(base, sites, config)
    return sites, config


def _site(base: AdaptedBase, adapter: Adapter, name: str) -> _Site:
    known = base.checkpoint.tensor(name)
    whole = _whole(base, adapter, name, known)
    lora = None if name in adapter.own else adapter.loras.get(name)
    transposed = is_transposed(base.module(name.rpartition(".")[0]))
    entry: dict[str, Any] = {"name": name, "shape": list(known.shape if whole is None else whole.shape)}
    entry |= {"dtype": _NAMES[known.dtype], "kind": "shared", "bytes": 0, "bpw": 0.0, "relative_error": 0.0}
    grown = whole is not None and whole.shape != known.shape
    if whole is not None and ((grown and known.dim() < 2) or not torch.equal(whole[: len(known)], known)):
        if lora is not None:
            delta = lora.dense(slice(None))
            whole = (whole.float() + (delta.T if transposed else delta)).to(known.dtype)
        return _Site(entry | {"kind": "replaced"}, [whole])
    rows, added = slice(None), []
    if whole is not None and grown:
        rows, beyond = slice(len(known)), slice(len(known), None)
        added = [whole[beyond] if lora is None else (whole[beyond].float() + lora.dense(beyond)).to(known.dtype)]
        entry["added"] = len(added[0])
    if lora is not None and (factors := Factors.of(*lora.factors(rows))).rank:
        entry |= {"kind": "low_rank", "transposed": transposed, "exponent": factors.exponent, "rank": factors.rank}
        entry["relative_error"] = factors.relative_error(*lora.factors(rows))
        return _Site(entry, [factors.u, factors.v, *added])
    return _rows_alone(entry, added[0]) if added else _Site(entry)


def _whole(base: AdaptedBase, adapter: Adapter, name: str, known: Tensor) -> Tensor | None:
    """What a parameter is before its factors, where the adapter says so; in the base's dtype, as peft loads it."""
    whole = adapter.own.get(name, adapter.ground.get(name))
    if whole is not None:
        same = whole.shape == known.shape
        grows = name in (base.embedding, base.head, base.head_bias) and whole.dim() == known.dim()
        if not same and not (grows and whole.shape[1:] == known.shape[1:] and len(whole) > len(known)):
            raise ArchitectureError(
                f"expected {name} in the base's shape {tuple(known.shape)}, found {tuple(whole.shape)} in the adapter",
                hint="only embeddings and head may have more rows",
            )
        whole = whole.to(known.dtype)
    if name in adapter.shifts:
        whole = ((known if whole is None else whole).float() + adapter.shifts[name]).to(known.dtype)
    return whole


def _rows_alone(entry: dict[str, Any], added: Tensor) -> _Site:
    """New rows and nothing else, which the format has as codes of no rows."""
    none = [torch.zeros(0, dtype=torch.int32), torch.zeros(0, 1).half(), torch.zeros(0, dtype=torch.int32)]
    part = {"bits": 1, "zero": 0.5, "rows": 0, "tiled": True}
    return _Site(entry | {"kind": "quantized", "parts": [part]}, [*none, added])


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _check_vocabulary(base: AdaptedBase, sites: dict[str, _Site], config: dict[str, Any]) -> None:
    """Embeddings and head must have grown alike; the config then says by how much."""
    rows = {
        name: sites[name].entry["shape"][0] for name in (base.embedding, base.head, base.head_bias) if name in sites
    }
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{name}: {count}" for name, count in rows.items())
        raise ArchitectureError(
            f"expected as many rows in embeddings and head, found {found}",
            hint="save the adapter with save_embedding_layers=True",
        )
    count = rows[base.embedding]
    if count != base.checkpoint.shape(base.embedding)[0]:
        inner = config.get("text_config")
        if isinstance(inner, dict) and "vocab_size" not in config:
            config["text_config"] = {**inner, "vocab_size": count}
        else:
            config["vocab_size"] = count


def _files(base: Path, adapter: Path) -> dict[str, Path]:
    """The small files of the expert by name: the adapter's where it has its own."""
    theirs, own = small_files(base), small_files(adapter)
    own.pop("config.json", None)  # a copy of the base's, if at all
    templates = matches(theirs, TEMPLATE)
    tokenizer = [name for name in theirs if name not in ("config.json", "generation_config.json", *templates)]
    dropped = tokenizer if matches(own, VOCABULARY) else []
    dropped += templates if _has_template(own) else []
    return {name: path for name, path in theirs.items() if name not in dropped} | own


def _has_template(files: dict[str, Path]) -> bool:
    if matches(files, TEMPLATE):
        return True
    if "tokenizer_config.json" not in files:
        return False
    try:
        return bool(json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8")).get("chat_template"))
    except ValueError as error:
        raise CheckpointError(f"expected JSON in {files['tokenizer_config.json']}, found otherwise: {error}") from error


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
