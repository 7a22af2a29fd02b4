"""Base and fine-tune to a delta directory, and back to an ordinary checkpoint.

What each site gets is decided here, from the preset and the module that owns the site; the work is native.
"""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from meswitch import _native
from meswitch.allocation import Allocation, Costs, allocate
from meswitch.calibration import Calibration, frequencies
from meswitch.checkpoint import HEAD, Checkpoint, moe_blocks, parameter_names, skeleton
from meswitch.config import config_changes, text_config
from meswitch.delta import TENSORS, Delta
from meswitch.errors import CheckpointError, FormatError, UnsupportedModelError
from meswitch.hessians import Hessians

# The small files of a checkpoint that lie beside a delta's tensors.
_BESIDE = (
    "config.json generation_config.json chat_template.* tokenizer* special_tokens_map.json added_tokens.json "
    "vocab.* merges.txt *.tiktoken spiece.model sentencepiece*.model"
).split()
METHODS = ("preset", "auto")


@dataclass(frozen=True)
class Rule:
    """How the sites of one role are stored; docs/architecture.md says what the codec does with it.

    `unbiased` scales keep a delta whole along itself, where least squares shrinks it. `compensate` lets what one input
    channel's code misses be made up for by the channels after it, where calibration says how they go together (GPTQ,
    arXiv 2210.17323). `frequent` is the share of rows,
    the most frequent tokens first, that take `frequent_bits` a code. `sparse` keeps changed weights one by one where
    that takes less than codes.
    """

    bits: int
    zero: Literal["symmetric", "level", "auto"] = "auto"
    group_size: int | None = None
    one_scale: bool = False
    column_scales: bool = True
    unbiased: bool = True
    compensate: bool = True
    salient: int = 0
    rank: int = 0
    frequent: float = 0.0
    frequent_bits: int = 4
    skip_unchanged_rows: bool = False
    sparse: bool = True


@dataclass(frozen=True)
class Preset:
    """A rule for block linears, embeddings and the head each; none means stored whole, as gates of MoE blocks are."""

    block: Rule
    embedding: Rule | None
    head: Rule | None


PRESETS = {
    "default": Preset(
        block=Rule(bits=2),
        embedding=Rule(bits=2, frequent=0.06, frequent_bits=4, skip_unchanged_rows=True),
        head=Rule(bits=2, rank=1, frequent=0.06, frequent_bits=4, skip_unchanged_rows=True),
    ),
    "small": Preset(
        block=Rule(bits=1),
        embedding=Rule(bits=1, frequent=0.2, frequent_bits=3, skip_unchanged_rows=True),
        head=Rule(bits=1, rank=1, frequent=0.2, frequent_bits=3, skip_unchanged_rows=True),
    ),
    # The two papers' own settings: embeddings and head stay at 16 bits there.
    "me-switch": Preset(
        block=Rule(
            bits=2, zero="level", column_scales=False, unbiased=False, compensate=False, salient=8, sparse=False
        ),
        embedding=None,
        head=None,
    ),
    "bitdelta": Preset(
        block=Rule(
            bits=1,
            zero="symmetric",
            one_scale=True,
            column_scales=False,
            unbiased=False,
            compensate=False,
            sparse=False,
        ),
        embedding=None,
        head=None,
    ),
}


@dataclass(frozen=True)
class Progress:
    """The site that is next, weights done and in all, seconds since the start, weights that an earlier run had done."""

    site: str
    done: int
    total: int
    seconds: float
    resumed: int = 0


@dataclass(frozen=True)
class CompressReport:
    """What a compress made: the bytes of manifest and tensors, bits a weight, and what it took.

    `config_changes`: the fields of config.json by which the fine-tune computes differently, with base's and fine-tune's
    value. The engine refuses an expert that has any; `restore` carries them. `compensated`: whether channels make up
    for the errors of others. `chosen` says what method `auto` did, one entry a role and form:
    `{role, form, sites, bytes_share, loss_share}`; none otherwise. `predicted_kl` is its guess at
    KL(fine-tune ‖ expert) in nats a token, where sensitivity was given.
    """

    preset: str
    method: str
    bytes: int
    bpw: float
    seconds: float
    weights_per_second: float
    peak_rss_bytes: int
    config_changes: dict[str, tuple[Any, Any]]
    compensated: bool = False
    chosen: list[dict[str, Any]] | None = None
    predicted_kl: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as they are, without `config_changes` where there are none."""
        return {name: value for name, value in asdict(self).items() if name != "config_changes" or value}


def compress(
    base: str | Path,
    finetune: str | Path,
    out: str | Path,
    *,
    preset: str | Preset = "default",
    bits: int | None = None,
    embedding_bits: int | None = None,
    method: str = "preset",
    bpw: float | None = None,
    target_bytes: int | None = None,
    calibration: Calibration | None = None,
    sensitivity: dict[str, Tensor] | None = None,
    compensate: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> CompressReport:
    """Writes the delta directory of a fine-tune against its base.

    `bits` (1, 2, 3, 4 or 8) overrides the preset for every site, `embedding_bits` for embeddings and head. Method
    `auto` chooses bits, rank, groups and salient channels site by site instead, so that manifest and tensors weigh at
    most `target_bytes`, or `bpw` bits a weight (either means `auto`), or what the preset would (docs/architecture.md).
    `calibration` weighs errors by what the model sees, `sensitivity` (`sensitivity.sense`) sites and rows by what an
    error there costs. With calibration, errors are compensated where the preset's rules say so, unless `compensate` is
    false or the model cannot be run a block at a time (fused MoE experts): memory then holds a block, and E[x xᵀ] of
    the widest input two or three times in float64. `preset` may be one of your own. An interrupted run leaves nothing
    at `out`, but its finished sites in `.NAME.incomplete` beside it, and the same call goes on from there; one that
    finishes replaces the delta directory that stood there.

    Raises `CheckpointError`, `ArchitectureError` or `NonFiniteError`; `BudgetError` for a target that cannot be met;
    `OSError` where the disk says no; `ValueError` for an unknown preset, method or number of bits, or two targets.
    """
    auto = _check_choices(preset, method, (bits, embedding_bits), bpw, target_bytes)
    label = preset if isinstance(preset, str) else "custom"
    start, target = time.perf_counter(), Path(out)
    refuse_overwriting(target)
    job = _Job(Checkpoint.open(base), Checkpoint.open(finetune), calibration)
    rules = _override(PRESETS[preset] if isinstance(preset, str) else preset, bits, embedding_bits)
    plans = list(_plans(job.base, job.finetune, rules, calibration))
    settings: dict[str, Any] = {
        "preset": label,
        "bits": bits,
        "embedding_bits": embedding_bits,
        "calibration_tokens": calibration.tokens if calibration else 0,
        "config_changes": _config_changes(job.base, job.finetune),
        "compensated": False,
    }

    resumed: int | None = None

    def step(site: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(site, done, total, time.perf_counter() - start, resumed or 0))

    found = None
    if auto:
        if bpw is not None:
            target_bytes = math.floor(bpw * job.parameters / 8)
        settings |= {"method": "auto", "target_bytes": target_bytes}
        every = list(_plans(job.base, job.finetune, PRESETS["default"], None))
        factor = job.factors(every) if compensate else None
        costs = job.costs(sensitivity or {}, factor is not None)
        found = job.allocate(plans, every, settings, costs, lambda site, done, total: step(site, done, 2 * total))
        plans = found.plans
        settings["chosen"] = found.summary()
    else:
        factor = job.factors(plans) if compensate else None

    def write(site: str, done: int, total: int) -> None:
        nonlocal resumed
        resumed = done if resumed is None else resumed
        step(site, total + done, 2 * total) if auto else step(site, done, total)

    settings["compensated"] = factor is not None
    _native.compress(
        *job.pair, target, plans, job.moments(plans), job.files, json.dumps(settings), job.name, write, factor
    )
    seconds, delta = time.perf_counter() - start, Delta.open(target)
    return CompressReport(
        preset=label,
        method="auto" if auto else "preset",
        bytes=delta.nbytes,
        bpw=delta.bpw,
        seconds=seconds,
        weights_per_second=(delta.parameters - (resumed or 0)) / seconds,
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        config_changes=settings["config_changes"],
        compensated=factor is not None,
        chosen=None if found is None else found.summary(),
        predicted_kl=None if found is None or not sensitivity else found.loss,
    )


def _config_changes(base: Checkpoint, finetune: Checkpoint) -> dict[str, tuple[Any, Any]]:
    try:
        ours, theirs = (text_config(checkpoint.path).to_dict() for checkpoint in (base, finetune))
    except (OSError, ValueError, KeyError):  # a model that transformers does not know: as the files say
        ours, theirs = base.config, finetune.config
    return config_changes(ours, theirs)


def small_files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint that lie beside a delta's tensors, by name."""
    return {file.name: file for pattern in _BESIDE for file in folder.glob(pattern) if file.is_file()}


def _check_choices(
    preset: str | Preset, method: str, widths: tuple[int | None, ...], bpw: float | None, target_bytes: int | None
) -> bool:
    """Whether sites are to be chosen for one by one."""
    if isinstance(preset, str) and preset not in PRESETS:
        raise ValueError(f"expected a preset of {', '.join(PRESETS)}, found {preset!r}")
    if method not in METHODS:
        raise ValueError(f"expected a method of {', '.join(METHODS)}, found {method!r}")
    for number in widths:
        if number not in (None, 1, 2, 3, 4, 8):
            raise ValueError(f"expected 1, 2, 3, 4 or 8 bits, found {number}")
    if bpw is not None and target_bytes is not None:
        raise ValueError(f"expected bits a weight or bytes, found both: {bpw}, {target_bytes}")
    if (bpw is not None and not 0 < bpw < math.inf) or (target_bytes is not None and target_bytes < 1):
        raise ValueError(f"expected a target above 0, found {bpw if target_bytes is None else target_bytes}")
    auto = method == "auto" or bpw is not None or target_bytes is not None
    if auto and any(number is not None for number in widths):
        raise ValueError(f"expected a target or numbers of bits, found both: bits {widths[0]}, embeddings' {widths[1]}")
    return auto


class _Job:
    """Base, fine-tune and what is said of them to the native half."""

    def __init__(self, base: Checkpoint, finetune: Checkpoint, calibration: Calibration | None) -> None:
        self.base, self.finetune, self._calibration = base, finetune, calibration
        self.pair = base.native, finetune.native
        self.parameters = sum(prod(finetune.shape(name)) for name in finetune.names())
        self.files = sorted(small_files(finetune.path).values())
        self.name = str(base.config.get("_name_or_path") or base.path.name)

    def moments(self, plans: list[dict[str, Any]]) -> dict[str, bytes]:
        """E[x²] of the sites that are quantized, as the native half takes it."""
        if self._calibration is None:
            return {}
        seen = self._calibration.second_moments
        wanted = (plan["name"] for plan in plans if plan["bits"] is not None)
        return {name: seen[name].float().contiguous().numpy().tobytes() for name in wanted if name in seen}

    def factors(self, plans: list[dict[str, Any]]) -> Callable[[str], bytes | None] | None:
        """What compensates the errors of the sites that ask for it, if anything can."""
        wanted = {plan["name"] for plan in plans if plan.get("compensate")}
        if self._calibration is None or not self._calibration.windows or not wanted:
            return None
        try:
            hessians = Hessians(self.finetune, self._calibration.windows)
        except UnsupportedModelError:
            return None
        return lambda site: hessians.factor(site) if site in wanted else None

    def costs(self, sensitivity: dict[str, Tensor], compensated: bool) -> Costs:
        """What errors cost, as far as calibration and `sensitivity` tell."""
        seen = self._calibration
        if seen is None:
            return Costs()
        return Costs(seen.second_moments, sensitivity, frequencies(seen.token_counts), compensated)

    def allocate(
        self,
        plans: list[dict[str, Any]],
        every: list[dict[str, Any]],
        settings: dict[str, Any],
        costs: Costs,
        progress: Callable[[str, int, int], None],
    ) -> Allocation:
        """`every` matrix at what it is worth, within `settings["target_bytes"]` or else what `plans` would weigh."""
        shared = {plan["name"] for plan in plans if _native.same(*self.pair, plan["name"])}

        def weigh(plans: list[dict[str, Any]], summary: list[dict[str, Any]]) -> int:
            # The longest number: what is least possible must not depend on what was asked for.
            said = json.dumps({**settings, "target_bytes": 10**15, "chosen": summary})
            return _native.weigh(*self.pair, plans, shared, self.files, said, self.name)

        if settings["target_bytes"] is None:
            settings["target_bytes"] = weigh(plans, [])
        return allocate(
            self.base,
            self.finetune,
            [{**plan, "shared": plan["name"] in shared} for plan in every],
            costs,
            settings["target_bytes"],
            lambda found: weigh(found.plans, found.summary()),
            progress,
        )


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
    names = set(finetune.names())
    if HEAD in base.names() and HEAD not in names and HEAD in finetune:
        names.add(HEAD)  # tied in the fine-tune alone: its head differs from the base's all the same
    owners = _owners(finetune, names)
    rules = {"block": preset.block, "embedding": preset.embedding, "head": preset.head, "gate": None}
    last = _Owner("block", False, (len(names) + len(owners), 0))
    for name in sorted(names, key=lambda name: (owners.get(name, last).order, _natural(name))):
        owner = owners.get(name, last)
        rule = rules[owner.role]
        plan: dict[str, Any] = {"name": name, "role": owner.role, "transposed": owner.transposed, "bits": None}
        if rule is not None and len(finetune.shape(name)) >= 2 and finetune.dtype(name).is_floating_point:
            plan |= {key: value for key, value in asdict(rule).items() if not key.startswith("frequent")}
            outer = owner.role in ("embedding", "head")
            plan["classes"] = _classes(rule, finetune.shape(name)[0], calibration) if outer else []
        yield plan


@dataclass(frozen=True)
class _Owner:
    """What the model says of a parameter: its role, whether it is stored transposed, when it runs."""

    role: Literal["block", "embedding", "head", "gate"]
    transposed: bool
    order: tuple[int, int]


def _owners(finetune: Checkpoint, names: Iterable[str]) -> dict[str, _Owner]:
    """The owners of the parameters that transformers knows, by their names in the checkpoint."""
    from transformers.pytorch_utils import Conv1D

    try:
        model = skeleton(finetune.path)
    except CheckpointError:
        finetune.config  # noqa: B018  a missing one is an error; a model that transformers does not know is not
        return {}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    gates = {id(gate) for _, block in moe_blocks(model) for gate in block.children() if not [*gate.children()]}
    owners: dict[str, _Owner] = {}
    for at, (module_name, module) in enumerate(model.named_modules()):
        role: Literal["block", "embedding", "head", "gate"] = "gate" if id(module) in gates else "block"
        if module is head or isinstance(module, nn.Embedding):
            role = "head" if module is head else "embedding"
        for number, (leaf, parameter) in enumerate(module.named_parameters(recurse=False)):
            # Stacked MoE experts lie one after another, each whole.
            order = (at, 0 if parameter.dim() > 2 else number)
            transposed = isinstance(module, Conv1D) and leaf == "weight"
            owners[f"{module_name}.{leaf}" if module_name else leaf] = _Owner(role, transposed, order)
    return {name: owners[parameter] for name, parameter in parameter_names(model, names).items()}


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 after expert 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


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
            if file != TENSORS:
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
