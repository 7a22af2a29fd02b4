"""An adapter of the peft package, read: what it says of each of the base's parameters.

peft wraps modules, so one parameter has several names there; `Adapter` undoes that:

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from meswitch.errors import ArchitectureError, CheckpointError, NonFiniteError, UnsupportedModelError
from meswitch.huggingface.checkpoint import HEAD, Checkpoint
from meswitch.huggingface.models import skeleton
from meswitch.huggingface.names import spellings

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
_MERGE = "merge the adapter into a copy of the base (peft: merge_and_unload), then compress that"


class AdaptedBase:
    """The base as peft saw it: modules by their path, and the checkpoint's name of each parameter."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        model: Any = skeleton(checkpoint.path)
        self.modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.prefix = str(model.base_model_prefix)
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
        return self.head == HEAD and HEAD not in self.checkpoint.names()

    def find(self, name: str) -> str | None:
        """The checkpoint's name of the parameter that a model calls `name`; none where there is none."""
        return next((found for found in spellings(name, self.prefix) if found in self.checkpoint), None)

    def module(self, path: str) -> nn.Module | None:
        return next((self.modules[found] for found in spellings(path, self.prefix) if found in self.modules), None)

    def sorted(self, names: set[str]) -> list[str]:
        return sorted(names, key=lambda name: (self.order.get(name, len(self.order)), name))


@dataclass(frozen=True)
class LoraFactors:
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
class Adapter:
    """What the adapter says of each of the base's parameters, by the checkpoint's names."""

    folder: Path
    settings: dict[str, Any]
    ground: dict[str, Tensor] = field(default_factory=dict)  # what it was trained on, where it says so
    own: dict[str, Tensor] = field(default_factory=dict)  # what it became, whole
    loras: dict[str, LoraFactors] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)  # what is added to a bias

    @classmethod
    def open(cls, folder: Path, base: AdaptedBase) -> Adapter:
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
            for one, other in ((base.embedding, HEAD), (HEAD, base.embedding)):
                if one in adapter.ground:
                    adapter.ground.setdefault(other, adapter.ground[one])
        for path, found in factors.items():
            adapter._factors(base, path, found, config)
        return adapter

    def _factors(self, base: AdaptedBase, path: str, found: dict[str, Tensor], config: dict[str, Any]) -> None:
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
        transposed = is_transposed(module)
        rows, columns = shape[::-1] if transposed else (*shape, 0, 0)[:2]
        expected = ((rank, rows), (columns, rank)) if embedding else ((rank, columns), (rows, rank))
        if len(shape) != 2 or (tuple(a.shape), tuple(b.shape)) != expected:
            raise ArchitectureError(
                f"expected factors {expected[0]} and {expected[1]} of {path} for a weight {shape}, "
                f"found {tuple(a.shape)} and {tuple(b.shape)}",
                hint="the adapter was trained on another base, or its adapter_config.json is another's",
            )
        self.loras[name] = LoraFactors(a.T, b.T, scaling) if embedding else LoraFactors(b, a, scaling)
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


def _known(base: AdaptedBase, name: str, found: str) -> str:
    known = base.find(name)
    if known is None:
        raise ArchitectureError(
            f"expected only parameters of the base, found {found} in the adapter",
            hint="the adapter was trained on another base",
        )
    return known


def is_transposed(module: nn.Module | None) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
