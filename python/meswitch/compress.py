"""Base and fine-tune to a delta directory, and back to an ordinary checkpoint.

What each site gets is decided here, from the preset and the module that owns the site; the work is native.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meswitch import _native
from meswitch.calibration import Calibration
from meswitch.checkpoint import Checkpoint, skeleton
from meswitch.delta import Delta
from meswitch.errors import CheckpointError, FormatError

# The small files of a checkpoint that lie beside a delta's tensors.
_BESIDE = (
    "config.json generation_config.json chat_template.* tokenizer* special_tokens_map.json added_tokens.json "
    "vocab.* merges.txt *.tiktoken spiece.model sentencepiece*.model"
).split()
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """How the sites of one role are stored. See DESIGN of the codec in docs/architecture.md.

    `frequent` is the share of rows, the most frequent tokens first, that take `frequent_bits` a code.
    """

    bits: int
    zero: Literal["symmetric", "level", "auto"] = "auto"
    group_size: int | None = None
    one_scale: bool = False
    column_scales: bool = False
    salient: int = 0
    rank: int = 0
    frequent: float = 0.0
    frequent_bits: int = 4
    skip_unchanged_rows: bool = False


@dataclass(frozen=True)
class Preset:
    """A rule for block linears, embeddings and the head each; none means stored whole."""

    block: Rule
    embedding: Rule | None
    head: Rule | None


PRESETS = {
    "default": Preset(
        block=Rule(bits=2, column_scales=True),
        embedding=Rule(bits=2, column_scales=True, frequent=0.1, frequent_bits=4, skip_unchanged_rows=True),
        head=Rule(bits=2, column_scales=True, rank=1, frequent=0.1, frequent_bits=4, skip_unchanged_rows=True),
    ),
    "small": Preset(
        block=Rule(bits=1, column_scales=True),
        embedding=Rule(bits=1, column_scales=True, frequent=0.2, frequent_bits=3, skip_unchanged_rows=True),
        head=Rule(bits=1, column_scales=True, rank=1, frequent=0.2, frequent_bits=3, skip_unchanged_rows=True),
    ),
    # The two papers' own settings: embeddings and head stay at 16 bits there.
    "me-switch": Preset(block=Rule(bits=2, zero="level", salient=8), embedding=None, head=None),
    "bitdelta": Preset(block=Rule(bits=1, zero="symmetric", one_scale=True), embedding=None, head=None),
}


@dataclass(frozen=True)
class Progress:
    """The site that is next, weights done and in all, seconds since the start."""

    site: str
    done: int
    total: int
    seconds: float


@dataclass(frozen=True)
class CompressReport:
    """What a compress made: the bytes of the delta's files, bits a weight, and what it took."""

    preset: str
    bytes: int
    bpw: float
    seconds: float
    weights_per_second: float
    peak_rss_bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compress(
    base: str | Path,
    finetune: str | Path,
    out: str | Path,
    *,
    preset: str = "default",
    bits: int | None = None,
    embedding_bits: int | None = None,
    calibration: Calibration | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> CompressReport:
    """Writes the delta directory of a fine-tune against its base.

    `bits` (1, 2, 3, 4 or 8) overrides the preset for every site, `embedding_bits` for embeddings and head.
    `calibration` weighs errors by what the model sees. An interrupted run leaves nothing at `out`; one that finishes
    replaces the delta directory that stood there.

    Raises `CheckpointError`, `ArchitectureError` or `NonFiniteError`; `OSError` where the disk says no; `ValueError`
    for an unknown preset or number of bits.
    """
    if preset not in PRESETS:
        raise ValueError(f"expected a preset of {', '.join(PRESETS)}, found {preset!r}")
    for number in (bits, embedding_bits):
        if number not in (None, 1, 2, 3, 4, 8):
            raise ValueError(f"expected 1, 2, 3, 4 or 8 bits, found {number}")
    start, target = time.perf_counter(), Path(out)
    refuse_overwriting(target)
    base_checkpoint, finetune_checkpoint = Checkpoint.open(base), Checkpoint.open(finetune)
    rules = _override(PRESETS[preset], bits, embedding_bits)
    plans = list(_plans(base_checkpoint, finetune_checkpoint, rules, calibration))
    settings = {
        "preset": preset,
        "bits": bits,
        "embedding_bits": embedding_bits,
        "calibration_tokens": calibration.tokens if calibration else 0,
    }

    def step(site: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(site, done, total, time.perf_counter() - start))

    _native.compress(
        base_checkpoint.native,
        finetune_checkpoint.native,
        target,
        plans,
        _moments(plans, calibration),
        sorted(small_files(finetune_checkpoint.path).values()),
        json.dumps(settings),
        str(base_checkpoint.config.get("_name_or_path") or base_checkpoint.path.name),
        step,
    )
    seconds, delta = time.perf_counter() - start, Delta.open(target)
    return CompressReport(
        preset=preset,
        bytes=delta.nbytes,
        bpw=delta.bpw,
        seconds=seconds,
        weights_per_second=delta.parameters / seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def small_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint that lie beside a delta's tensors, by name."""
    return {file.name: file for pattern in _BESIDE for file in folder.glob(pattern) if file.is_file()}


def refuse_overwriting(target: Path) -> None:
    """Raises `FormatError` where something stands that is not a delta directory."""
    if target.exists() and not (target / "meswitch.json").is_file() and (target.is_file() or any(target.iterdir())):
        raise FormatError(
            f"expected a new folder or a delta directory to write to, found something else at {target}",
            hint="choose another folder; only a delta directory is replaced",
        )


def _override(preset: Preset, bits: int | None, embedding_bits: int | None) -> Preset:
    """The preset at other bit widths: every row of a site at the same one then."""

    def at(rule: Rule | None, width: int | None) -> Rule | None:
        if width is None:
            return rule
        return replace(
            rule or preset.block, bits=width, frequent=0.0, one_scale=False if rule is None else rule.one_scale
        )

    outer = embedding_bits if embedding_bits is not None else bits
    block = at(preset.block, bits)
    assert block is not None  # every preset has a rule for block linears
    return Preset(block, at(preset.embedding, outer), at(preset.head, outer))


def _plans(
    base: Checkpoint, finetune: Checkpoint, preset: Preset, calibration: Calibration | None
) -> Iterator[dict[str, Any]]:
    """One plan a parameter, in the order in which the model runs them."""
    owners = _owners(finetune)
    names = set(finetune.names())
    if _HEAD in base.names() and _HEAD not in names and _HEAD in finetune:
        names.add(_HEAD)  # tied in the fine-tune alone: its head differs from the base's all the same
    order = {name: at for at, name in enumerate(owners)}
    for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
        role, transposed = owners.get(name, ("block", False))
        rule = {"block": preset.block, "embedding": preset.embedding, "head": preset.head}[role]
        if name == _HEAD and _HEAD not in base.names():
            rule = preset.head
        plan: dict[str, Any] = {"name": name, "transposed": transposed, "bits": None}
        if rule is not None and len(finetune.shape(name)) >= 2 and finetune.dtype(name).is_floating_point:
            plan |= {key: value for key, value in asdict(rule).items() if not key.startswith("frequent")}
            plan["classes"] = _classes(rule, finetune.shape(name)[0], calibration) if role != "block" else []
        yield plan


def _owners(finetune: Checkpoint) -> dict[str, tuple[str, bool]]:
    """The role of each parameter, and whether it is stored transposed, by its name in the checkpoint."""
    from transformers.pytorch_utils import Conv1D

    try:
        model = skeleton(finetune.path)
    except CheckpointError:
        finetune.config  # noqa: B018  a missing one is an error; a model that transformers does not know is not
        return {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    prefix = getattr(model, "base_model_prefix", "") + "."
    owners: dict[str, tuple[str, bool]] = {}
    for module_name, module in model.named_modules():
        role = "head" if module is head else "embedding" if isinstance(module, nn.Embedding) else "block"
        for parameter in dict(module.named_parameters(recurse=False)):
            name = f"{module_name}.{parameter}" if module_name else parameter
            entry = (role, isinstance(module, Conv1D) and parameter == "weight")
            owners[name] = entry
            if name.startswith(prefix):
                owners.setdefault(name[len(prefix) :], entry)
    return owners


def _classes(rule: Rule, rows: int, calibration: Calibration | None) -> list[tuple[int, list[int]]]:
    """The rows of the most frequent tokens: by calibration, else by the tokenizer's order."""
    count = round(rule.frequent * rows)
    if count == 0 or rule.frequent_bits == rule.bits:
        return []
    counts = torch.zeros(rows, dtype=torch.int64)
    if calibration is not None:
        seen = calibration.token_counts[:rows]
        counts[: len(seen)] = seen
    frequent = torch.argsort(counts, descending=True, stable=True)[:count]
    return [(rule.frequent_bits, sorted(frequent.tolist()))]


def _moments(plans: list[dict[str, Any]], calibration: Calibration | None) -> dict[str, bytes]:
    if calibration is None:
        return {}
    moments: dict[str, bytes] = {}
    for plan in plans:
        seen = calibration.second_moments.get(plan["name"])
        if seen is not None and plan["bits"] is not None:
            moments[plan["name"]] = seen.float().contiguous().numpy().tobytes()
    return moments


def restore(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = 4 << 30,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes an ordinary checkpoint: base plus delta, in the fine-tune's shapes and dtypes, with its tokenizer.

    Memory holds one file at a time, of about `shard_bytes` at the most. `progress` gets weights done and in all.
    Raises `BaseMismatchError` for another base, `FormatError` where `out` stands already.
    """
    opened, checkpoint, target = Delta.open(delta), Checkpoint.open(base), Path(out)
    opened.check_base(checkpoint)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FormatError(f"expected a new folder to write to, found {target}", hint="choose another folder")
    partial = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in opened.manifest["files"]:
            if file != "delta.safetensors":
                shutil.copyfile(opened.path / file, partial / file)
        _write_shards(partial, opened, checkpoint, shard_bytes, progress or (lambda done, total: None))
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(
    folder: Path, delta: Delta, base: Checkpoint, shard_bytes: int, progress: Callable[[int, int], None]
) -> None:
    from safetensors.torch import save_file

    shards = _shards(delta, shard_bytes)
    index: dict[str, str] = {}
    done, total = 0, delta.parameters
    for number, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            progress(done, total)
            # A copy: safetensors refuses tensors that share memory, as views of one mapped file do.
            tensors[name] = delta.sites[name].rebuild(base).clone(memory_format=torch.contiguous_format)
            done += delta.sites[name].parameters
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    progress(done, total)
    if len(shards) > 1:
        total = sum(site.parameters * site.dtype.itemsize for site in delta.sites.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text)


def _shards(delta: Delta, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, site in delta.sites.items():
        size += site.parameters * site.dtype.itemsize
        if size > shard_bytes and shards[-1]:
            shards.append([])
            size = site.parameters * site.dtype.itemsize
        shards[-1].append(name)
    return shards
