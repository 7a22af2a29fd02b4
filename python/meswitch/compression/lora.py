"""Importing a LoRA adapter of peft as an expert: its factors are stored as they are, not quantized.

    parameter                                          kind of its site
    W + scaling · B·A                                  low_rank: u = scaling · B, v = A, in 16 bits
    of a module in `modules_to_save`, or a bias        replaced
    an embedding or head with new rows alone           quantized, with no codes and these rows uncompressed
    unchanged                                          shared

`adapter.py` reads what peft wrote, and refuses whatever would change the arithmetic in another way.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch import _native
from meswitch.compression.adapter import Adapter, BaseModel, LoraFactors
from meswitch.compression.low_rank import Factors
from meswitch.compression.owners import Owner, parameter_owners
from meswitch.delta.directory import MANIFEST, Delta
from meswitch.errors import ArchitectureError, CheckpointError
from meswitch.huggingface.checkpoint import DTYPES, HEAD, Checkpoint, resolve
from meswitch.huggingface.config import parse_json
from meswitch.huggingface.files import TEMPLATE, TOKENIZER, VOCABULARY, carried_files, matches
from meswitch.huggingface.models import is_transposed
from meswitch.progress import Progress, ProgressCallback
from meswitch.site import from_matrix
from meswitch.target import resolve_target

_TOKENIZER_CONFIG = "tokenizer_config.json"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ImportReport:
    """What an import wrote: bytes of manifest and tensors, bits per weight, and the number of sites of each kind.

    `replaced` counts sites of new rows alone, too. `notes`: what else is worth a word, a sentence each.
    """

    bytes: int
    bpw: float
    seconds: float
    low_rank: int
    replaced: int
    shared: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields by their names, without `notes` if there are none."""
        return {name: value for name, value in asdict(self).items() if value or name != "notes"}


def import_adapter(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    progress: ProgressCallback | None = None,
) -> ImportReport:
    """Writes the delta directory of a LoRA adapter (`adapter_config.json` and `adapter_model.safetensors`).

    `base` and `adapter` are folders or hub ids. Tokenizer files and chat template are the adapter's if it has its own,
    else the base's. `progress` counts weights. An interrupted run leaves nothing at `out`; a finished one replaces a
    delta directory that was there.

    Raises `UnsupportedModelError` for an adapter that is not plain LoRA or a base that is quantized,
    `ArchitectureError` for one of another base, `CheckpointError` for an incomplete one, `NonFiniteError`,
    `OutputError` where something else is at `out`, and `OSError` where files cannot be written.

    >>> import_adapter("base/", "math-lora/", "experts/lora").low_rank
    4
    """
    start, target = time.perf_counter(), resolve_target(out, replaces=MANIFEST)
    checkpoint = Checkpoint.open(base)
    model = BaseModel(checkpoint)
    opened = Adapter.open(resolve(adapter), model)
    sites, config = _sites(model, opened)
    _write(model.checkpoint, opened, sites, config, target, progress)
    delta, kinds = Delta.open(target), [site.entry["kind"] for site in sites.values()]
    counts = {kind: kinds.count(kind) for kind in ("low_rank", "replaced", "shared")}
    counts["replaced"] += kinds.count("quantized")
    notes = tuple(_notes(str(base), checkpoint, opened))
    return ImportReport(delta.nbytes, delta.bpw, time.perf_counter() - start, **counts, notes=notes)


def _notes(given: str, base: Checkpoint, adapter: Adapter) -> Iterator[str]:
    """What an import's report has to say. `given`: the path or hub id that the base was opened by."""
    if not _may_be(adapter.base_name, base, given):
        yield f"the adapter says that its base is {adapter.base_name}, found {base.name}: it fits any of equal shapes"
    if (adapter.folder / "new_embeddings.safetensors").is_file():
        yield "new_embeddings.safetensors is not read: rows of new tokens are those of the adapter itself"


def _may_be(name: str, base: Checkpoint, given: str) -> bool:
    """Whether a hub id or a path may mean this base: a model keeps its own name in whichever folder it lies."""
    if not name or os.path.isdir(name):  # a name may be no path at all, for which `Path.is_dir` raises
        return not name or os.path.samefile(name, base.path)
    ours = (given, base.path.absolute().name, base.name)
    return Path(name).name.lower() in {Path(our).name.lower() for our in ours}


@dataclass(frozen=True)
class _ImportedSite:
    """An entry of the manifest, and its tensors in the order of the file format."""

    entry: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)

    def equals(self, other: _ImportedSite) -> bool:
        """Whether both are the same but for the name."""
        same_entry = {**self.entry, "name": None} == {**other.entry, "name": None}
        return same_entry and all(map(torch.equal, self.tensors, other.tensors))


def _write(
    base: Checkpoint,
    adapter: Adapter,
    sites: dict[str, _ImportedSite],
    config: dict[str, Any],
    target: Path,
    progress: ProgressCallback | None,
) -> None:
    def step(site: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("importing", done, total, site))

    with tempfile.TemporaryDirectory() as temporary:
        files = _files(base.path, adapter.folder, Path(temporary))
        if config != base.config:
            files["config.json"] = Path(temporary) / "config.json"
            files["config.json"].write_text(json.dumps(config, indent=2) + "\n")
        _native.write(
            base.native,
            target,
            [json.dumps(site.entry) for site in sites.values()],
            lambda name: [_bytes(tensor) for tensor in sites[name].tensors],
            [files[name] for name in sorted(files)],
            json.dumps({"adapter": "lora", **adapter.settings}),
            base.name,
            step,
        )


# --- sites ------------------------------------------------------------------------------------------------------------


def _sites(base: BaseModel, adapter: Adapter) -> tuple[dict[str, _ImportedSite], dict[str, Any]]:
    """A site for every parameter, in the order in which the model runs them, and the expert's config."""
    names, config = set(base.checkpoint.names()), dict(base.checkpoint.config)
    tied_names = [name for name in (base.embedding, base.head) if name is not None]
    if base.tied:
        names.add(HEAD)
    owners = parameter_owners(base.checkpoint, names)
    sites = {name: _site(base, adapter, name, owners.get(name)) for name in base.sorted(names)}
    if base.tied and sites[base.embedding].equals(sites[HEAD]):
        del sites[HEAD]
    elif config.get("tie_word_embeddings", True) and any(sites[name].entry["kind"] != "shared" for name in tied_names):
        config["tie_word_embeddings"] = False
    _update_vocabulary(base, sites, config)
    return sites, config


def _site(base: BaseModel, adapter: Adapter, name: str, owner: Owner | None) -> _ImportedSite:
    base_value = base.checkpoint.tensor(name)
    value = _value_without_factors(base, adapter, name, base_value)
    factors = None if name in adapter.replaced else adapter.factors.get(name)
    transposed = is_transposed(base.module(name.rpartition(".")[0]))
    entry: dict[str, Any] = {"name": name, "shape": list(base_value.shape if value is None else value.shape)}
    entry |= {"dtype": _DTYPE_NAMES[base_value.dtype], "kind": "shared"}
    entry |= {"bytes": 0, "bpw": 0.0, "relative_error": 0.0}
    if owner is not None and owner.place is not None:
        entry["owner"] = dict(zip(("layer", "moe_expert"), owner.place, strict=True))
    if value is None:
        return _low_rank_site(entry, factors, slice(None), [], transposed=transposed)
    grown = value.shape != base_value.shape
    if (grown and base_value.dim() < 2) or not torch.equal(value[: len(base_value)], base_value):
        if factors is not None:
            change = from_matrix(factors.dense(slice(None)), value.shape, transposed=transposed)
            value = (value.float() + change).to(base_value.dtype)
        return _ImportedSite(entry | {"kind": "replaced"}, [value])
    if not grown:
        return _low_rank_site(entry, factors, slice(None), [], transposed=transposed)
    old, new = slice(len(base_value)), slice(len(base_value), None)
    added = value[new] if factors is None else (value[new].float() + factors.dense(new)).to(base_value.dtype)
    return _low_rank_site(entry | {"added": len(added)}, factors, old, [added], transposed=transposed)


def _low_rank_site(
    entry: dict[str, Any], factors: LoraFactors | None, rows: slice, added: list[Tensor], *, transposed: bool
) -> _ImportedSite:
    """A site with the factors of these rows, or with none if they are all zeros. `added`: the new rows, or nothing."""
    if factors is not None and (stored := Factors.from_product(*factors.scaled(rows))).rank:
        entry = entry | {"kind": "low_rank", "transposed": transposed, "exponent": stored.exponent, "rank": stored.rank}
        entry["relative_error"] = stored.relative_error(*factors.scaled(rows))
        return _ImportedSite(entry, [stored.u, stored.v, *added])
    return _site_of_new_rows(entry, added[0]) if added else _ImportedSite(entry)


def _site_of_new_rows(entry: dict[str, Any], added: Tensor) -> _ImportedSite:
    """New rows and no other change, which the file format writes as codes of no rows."""
    no_codes = [torch.zeros(0, dtype=torch.int32), torch.zeros(1, 0).half(), torch.zeros(0, dtype=torch.int32)]
    part = {"bits": 1, "zero": 0.5, "rows": 0}
    return _ImportedSite(entry | {"kind": "quantized", "parts": [part]}, [*no_codes, added])


def _value_without_factors(base: BaseModel, adapter: Adapter, name: str, base_value: Tensor) -> Tensor | None:
    """A parameter's value before its factors, in the base's dtype, as peft loads it; `None` if it is the base's.

    Raises `ArchitectureError` for a shape that neither is the base's nor has more rows of a vocabulary.
    """
    value = adapter.replaced.get(name, adapter.trained_on.get(name))
    if value is not None:
        same_shape = value.shape == base_value.shape
        may_grow = name in (base.embedding, base.head, base.head_bias) and value.dim() == base_value.dim()
        grown = may_grow and value.shape[1:] == base_value.shape[1:] and len(value) > len(base_value)
        if not same_shape and not grown:
            raise ArchitectureError(
                f"expected {name} in the base's shape {tuple(base_value.shape)}, "
                f"found {tuple(value.shape)} in the adapter",
                hint="only embeddings and head may have more rows",
            )
        value = value.to(base_value.dtype)
    if name in adapter.bias_changes:
        value = ((base_value if value is None else value).float() + adapter.bias_changes[name]).to(base_value.dtype)
    return value


def _update_vocabulary(base: BaseModel, sites: dict[str, _ImportedSite], config: dict[str, Any]) -> None:
    """Writes a grown vocabulary's size into the config.

    Raises `ArchitectureError` unless embedding, head and its bias have as many rows.
    """
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
        text_config = config.get("text_config")
        if isinstance(text_config, dict) and "vocab_size" not in config:
            config["text_config"] = {**text_config, "vocab_size": count}
        else:
            config["vocab_size"] = count


# --- files ------------------------------------------------------------------------------------------------------------


def _files(base: Path, adapter: Path, scratch: Path) -> dict[str, Path]:
    """The small files of the expert by name: the adapter's where it has its own, else the base's."""
    for name in ("base", "adapter"):
        (scratch / name).mkdir()
    base_files, adapter_files = carried_files(base, scratch / "base"), carried_files(adapter, scratch / "adapter")
    adapter_files.pop("config.json", None)  # if there is one, it is a copy of the base's
    templates = matches(base_files, TEMPLATE)
    tokenizer = [name for name in matches(base_files, TOKENIZER) if name not in templates]
    own_tokenizer = bool(matches(adapter_files, VOCABULARY))
    own_template = bool(matches(adapter_files, TEMPLATE) or _tokenizer_config(adapter_files).get("chat_template"))
    dropped = (tokenizer if own_tokenizer else []) + (templates if own_template else [])
    files = {name: path for name, path in base_files.items() if name not in dropped} | adapter_files
    template = _tokenizer_config(base_files).get("chat_template")
    if own_tokenizer and not own_template and not templates and template:  # in the base's file, which was dropped
        config = _tokenizer_config(files) | {"chat_template": template}
        files[_TOKENIZER_CONFIG] = scratch / _TOKENIZER_CONFIG
        files[_TOKENIZER_CONFIG].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return files


def _tokenizer_config(files: dict[str, Path]) -> dict[str, Any]:
    """The tokenizer_config.json among some files, if there is one. Raises `CheckpointError` where it is broken."""
    if _TOKENIZER_CONFIG not in files:
        return {}
    try:
        config = parse_json(files[_TOKENIZER_CONFIG].read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"expected JSON in {files[_TOKENIZER_CONFIG]}, found otherwise: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"expected an object in {files[_TOKENIZER_CONFIG]}, found {type(config).__name__}")
    return config


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
