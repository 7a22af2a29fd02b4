"""A LoRA adapter of the peft package as an expert: its factors stay factors.

    W + scaling · B·A          low_rank: u = scaling · B, v = A, in 16 bits
    modules_to_save, biases    replaced (a grown vocabulary: its new rows alone)
    all else                   shared

peft wraps modules, so one parameter has several names there; `_Adapter` undoes that:

    M.lora_A.weight [r, in]       M.lora_B.weight [out, r]       M.lora_B.bias [out]       of a linear
    M.lora_embedding_A [r, rows]  M.lora_embedding_B [width, r]                            of an embedding
    M.base_layer.P, M.original_module.P       what M.P was when the adapter was trained: ground for LoRA and ties
    M.P                                       the same, or, in a module of `modules_to_save`, what M.P became

What would change the arithmetic in any other way is refused by name, never left out.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from meswitch import _native
from meswitch.checkpoint import DTYPES, Checkpoint, resolve, skeleton
from meswitch.compress import Progress, refuse_overwriting, small_files
from meswitch.delta import Delta
from meswitch.errors import ArchitectureError, CheckpointError, NonFiniteError, UnsupportedModelError
from meswitch.low_rank import Factors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields that say how the adapter was trained, or are read below; any other that is set changes what it computes.
_READ = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform "
    "loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_core modules_to_save peft_type "
    "peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora".split()
)
# How A and B may have started. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")
_WRAPPED = re.compile(r"(.+)\.(base_layer|original_module)\.(.+)")
_HEAD = "lm_head.weight"
_MERGE = "merge the adapter into a copy of the base (peft: merge_and_unload), then compress that"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece*.model", "*.tiktoken")


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
    progress: Callable[[Progress], None] | None = None,
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
    opened = _Base(Checkpoint.open(base))
    read = _Adapter.open(resolve(adapter), opened)
    made, config = _sites(opened, read)

    def step(site: str, done: int, total: int) -> None:
        if progress is not None:
            progress(Progress(site, done, total, time.perf_counter() - start))

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


class _Base:
    """The base as peft saw it: modules by their path, and the checkpoint's name of each parameter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        model: Any = skeleton(checkpoint.path)
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.prefix = f"{model.base_model_prefix}."
        paths = {id(module): path for path, module in reversed(list(self.modules.items()))}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        found = self.find(f"{paths[id(embedding)]}.weight")
        if found is None:
            raise CheckpointError(f"expected the model's embeddings in {checkpoint.path}, found none of their name")
        self.embedding = found
        # A tied checkpoint has no head of its own, but answers for it with its embeddings.
        self.head = None if head is None else self.find(f"{paths[id(head)]}.weight")
        self.head_bias = None if head is None else self.find(f"{paths[id(head)]}.bias")
        self.order = {self.find(name): at for at, (name, _) in enumerate(model.named_parameters())}

    @property
    def tied(self) -> bool:
        """Whether embeddings and head are one tensor on disk."""
        return self.head == _HEAD and _HEAD not in self.checkpoint.names()

    def find(self, name: str) -> str | None:
        """The checkpoint's name of the parameter that a model calls `name`; none where there is none."""
        return next((found for found in self._names(name) if found in self.checkpoint), None)

    def module(self, path: str) -> nn.Module | None:
        return next((self.modules[found] for found in self._names(path) if found in self.modules), None)

    def _names(self, name: str) -> tuple[str, ...]:
        """A name, with and without the prefix that a checkpoint or an adapter may leave out."""
        return name, self.prefix + name, name.removeprefix(self.prefix)

    def sorted(self, names: set[str]) -> list[str]:
        return sorted(names, key=lambda name: (self.order.get(name, len(self.order)), name))


@dataclass(frozen=True)
class _Lora:
    """`left [out, r]` and `right [r, in]`, in the adapter's dtype."""

    left: Tensor
    right: Tensor
    scaling: float

    def factors(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Of these rows, in float64, scaling included."""
        return self.left[rows].double() * self.scaling, self.right.double()

    def dense(self, rows: slice) -> Tensor:
        u, v = self.factors(rows)
        return (u @ v).float()


@dataclass
class _Adapter:
    """What the adapter says of each of the base's parameters, by the checkpoint's names."""

    folder: Path
    settings: dict[str, Any]
    ground: dict[str, Tensor] = field(default_factory=dict)  # what it was trained on, where it says so
    own: dict[str, Tensor] = field(default_factory=dict)  # what it became, whole
    loras: dict[str, _Lora] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)  # what is added to a bias

    @classmethod
    def open(cls, folder: Path, base: _Base) -> _Adapter:
        config = _config(folder)
        tensors = _tensors(folder)
        adapter = cls(folder, {name: config.get(name) for name in ("r", "lora_alpha", "use_rslora", "peft_version")})
        factors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if match := _FACTOR.fullmatch(key):
                factors.setdefault(match[1], {})[match[2]] = tensor
            elif match := _WRAPPED.fullmatch(key):
                adapter.ground[_known(base, f"{match[1]}.{match[3]}", key)] = tensor
            elif ".lora_" in key:
                raise UnsupportedModelError(f"expected the tensors of plain LoRA, found {key}: {folder}", hint=_MERGE)
            elif key.replace(".modules_to_save.", ".") in tensors and ".modules_to_save." in key:
                continue  # a copy that peft itself does not read
            else:
                saved = any(key.rpartition(".")[0].endswith(name) for name in config.get("modules_to_save") or ())
                (adapter.own if saved else adapter.ground)[_known(base, key, key)] = tensor
        if base.tied:  # one tensor when it was trained
            for one, other in ((base.embedding, _HEAD), (_HEAD, base.embedding)):
                if one in adapter.ground:
                    adapter.ground.setdefault(other, adapter.ground[one])
        for path, found in factors.items():
            adapter._factors(base, path, found, config)
        return adapter

    def _factors(self, base: _Base, path: str, found: dict[str, Tensor], config: dict[str, Any]) -> None:
        name = _known(base, f"{path}.weight", path)
        module = base.module(path)
        embedding = isinstance(module, nn.Embedding)
        roles = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        missing = [role for role in roles if role not in found]
        if missing or found.keys() - {*roles, "lora_B.bias"}:
            raise CheckpointError(
                f"expected {' and '.join(roles)} of {path}, found {', '.join(sorted(found))}: {self.folder}",
                hint="the adapter was not saved whole",
            )
        rank, scaling = _rank_and_scaling(path, config)
        a, b = (found[role] for role in roles)
        shape = tuple(self.ground[name].shape) if name in self.ground else base.checkpoint.shape(name)
        transposed = _transposed(module)
        rows, columns = shape[::-1] if transposed else (*shape, 0, 0)[:2]
        expected = ((rank, rows), (columns, rank)) if embedding else ((rank, columns), (rows, rank))
        if len(shape) != 2 or (tuple(a.shape), tuple(b.shape)) != expected:
            raise ArchitectureError(
                f"expected factors {expected[0]} and {expected[1]} of {path} for a weight {shape}, "
                f"found {tuple(a.shape)} and {tuple(b.shape)}",
                hint="the adapter was trained on another base, or its adapter_config.json is another's",
            )
        self.loras[name] = _Lora(a.T, b.T, scaling) if embedding else _Lora(b, a, scaling)
        if "lora_B.bias" in found and found["lora_B.bias"].any():
            bias = base.find(f"{path}.bias")
            if bias is None or tuple(found["lora_B.bias"].shape) != base.checkpoint.shape(bias):
                raise UnsupportedModelError(
                    f"expected a bias of the base for lora_bias to go to, found none at {path}",
                    hint="a delta changes the parameters a model has, and adds none",
                )
            self.shifts[bias] = found["lora_B.bias"].float() * scaling


def _config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, refused where it is not plain LoRA."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(
            f"expected a peft adapter's {CONFIG} in {folder}, found {type(error).__name__}",
            hint="an adapter folder is what peft's save_pretrained writes",
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UnsupportedModelError(f"expected peft_type LORA in {CONFIG}, found {found}: {folder}", hint=_MERGE)
    start = config.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UnsupportedModelError(
            f"expected init_lora_weights that leave the base as it is in {CONFIG}, found {start}: {folder}",
            hint="save the adapter with path_initial_model_for_weight_conversion, which makes plain LoRA of it",
        )
    for name, value in config.items():
        if name not in _READ and value:
            raise UnsupportedModelError(
                f"expected plain LoRA in {CONFIG}, found {name} = {json.dumps(value)}: {folder}", hint=_MERGE
            )
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors as mapped views, by name without peft's prefix."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = sorted(folder.glob("adapter_model.*"))
        raise CheckpointError(
            f"expected {WEIGHTS}, found {pickled[0].name if pickled else 'no adapter'} in {folder}",
            hint="pickles run code and are not read: load the adapter in peft and save it with safe_serialization=True",
        )
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  not a dictionary
                tensors[key.removeprefix(_PREFIX)] = file.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f"expected a whole {WEIGHTS}, found a broken one: {error}: {folder}") from error
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise NonFiniteError(
                f"expected finite weights, found others in {key}: {path}",
                hint="the adapter is damaged, or its training diverged",
            )
    if not tensors:
        raise CheckpointError(f"expected tensors, found none in {path}", hint="the adapter was not saved whole")
    return tensors


def _rank_and_scaling(path: str, config: dict[str, Any]) -> tuple[int, float]:
    """r and alpha / r (or alpha / √r) of a module, by the first pattern that names it, as peft chooses.

    >>> _rank_and_scaling("model.layers.1.q_proj", {"r": 8, "lora_alpha": 16, "rank_pattern": {r"layers\\.1\\..*": 4}})
    (4, 4.0)
    """

    def of(patterns: str, otherwise: str) -> Any:
        try:
            for pattern, value in dict(config.get(patterns) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", path):
                    return value
        except (re.error, TypeError, ValueError) as error:
            raise CheckpointError(f"expected modules and numbers in {patterns} of {CONFIG}, found {error}") from error
        return config.get(otherwise, 8)

    rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"expected a positive r and a number lora_alpha in {CONFIG}, found {rank} and {alpha}")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _known(base: _Base, name: str, found: str) -> str:
    known = base.find(name)
    if known is None:
        raise ArchitectureError(
            f"expected only parameters of the base, found {found} in the adapter",
            hint="the adapter was trained on another base",
        )
    return known


def _transposed(module: nn.Module | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


@dataclass(frozen=True)
class _Site:
    """An entry of the manifest and its tensors, in the format's order."""

    entry: dict[str, Any]
    tensors: list[Tensor] = field(default_factory=list)

    def same(self, other: _Site) -> bool:
        plain = {**self.entry, "name": None} == {**other.entry, "name": None}
        return plain and all(map(torch.equal, self.tensors, other.tensors))


def _sites(base: _Base, adapter: _Adapter) -> tuple[dict[str, _Site], dict[str, Any]]:
    """A site for every parameter, in the order in which the model runs them, and the expert's config."""
    names, config = set(base.checkpoint.names()), dict(base.checkpoint.config)
    pair = [name for name in (base.embedding, base.head) if name is not None]
    if base.tied:
        names.add(_HEAD)
    sites = {name: _site(base, adapter, name) for name in base.sorted(names)}
    if base.tied and sites[pair[0]].same(sites[_HEAD]):
        del sites[_HEAD]
    elif config.get("tie_word_embeddings", True) and any(sites[name].entry["kind"] != "shared" for name in pair):
        config["tie_word_embeddings"] = False
    _check_vocabulary(base, sites, config)
    return sites, config


def _site(base: _Base, adapter: _Adapter, name: str) -> _Site:
    known = base.checkpoint.tensor(name)
    whole = _whole(base, adapter, name, known)
    lora = None if name in adapter.own else adapter.loras.get(name)
    transposed = _transposed(base.module(name.rpartition(".")[0]))
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


def _whole(base: _Base, adapter: _Adapter, name: str, known: Tensor) -> Tensor | None:
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


def _check_vocabulary(base: _Base, sites: dict[str, _Site], config: dict[str, Any]) -> None:
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
    tokenizer = [name for name in theirs if name not in ("config.json", "generation_config.json")]
    if any(Path(name).match(pattern) for name in own for pattern in _VOCABULARIES):
        dropped = [name for name in tokenizer if not name.startswith("chat_template.")]
    else:
        dropped = []
    if _has_template(own):
        dropped += [name for name in tokenizer if name.startswith("chat_template.")]
    return {name: path for name, path in theirs.items() if name not in dropped} | own


def _has_template(files: dict[str, Path]) -> bool:
    if any(name.startswith("chat_template.") for name in files):
        return True
    if "tokenizer_config.json" not in files:
        return False
    try:
        return bool(json.loads(files["tokenizer_config.json"].read_text(encoding="utf-8")).get("chat_template"))
    except ValueError as error:
        raise CheckpointError(f"expected JSON in {files['tokenizer_config.json']}, found otherwise: {error}") from error


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
