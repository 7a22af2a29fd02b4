"""Reading a LoRA adapter of the peft package: what it changes in each of the base's parameters.

peft wraps modules, so a parameter `M.P` of the base has several names in an adapter; `Adapter` maps them back:

    M.lora_A.weight [r, in]       M.lora_B.weight [out, r]       M.lora_B.bias [out]       factors of a linear
    M.lora_embedding_A [r, rows]  M.lora_embedding_B [width, r]                            factors of an embedding
    M.base_layer.P, M.original_module.P       the value of M.P that the adapter was trained on
    M.P                                       the same; but in a module of `modules_to_save`, the value after training

Whatever else changes the arithmetic is refused with its name, never ignored.
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
from meswitch.huggingface.config import parse_json
from meswitch.huggingface.models import is_transposed, skeleton
from meswitch.huggingface.names import spellings
from meswitch.site import matrix_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields that say how the adapter was trained, or that are read below. Any other that is set changes the arithmetic.
_KNOWN_FIELDS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config "
    "exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform "
    "loftq_config lora_alpha lora_bias lora_dropout lora_ga_config megatron_core modules_to_save peft_type "
    "peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora".split()
)
# Initial values of A and B that leave the base alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B)")
_ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.([^.]+)(?=\.(?:weight|bias)$)|(?<=\.lora_embedding_[AB])\.([^.]+)$")
_WRAPPED = re.compile(r"(.+)\.(base_layer|original_module)\.(.+)")
_SAVED_COPY = ".modules_to_save."
_MERGE = "merge the adapter into a copy of the base (peft: merge_and_unload), then compress that"


class BaseModel:
    """The base that an adapter belongs to: its modules by path, and the checkpoint's name of each parameter.

    `embedding`, `head`, `head_bias`: the checkpoint's names of these parameters, `None` where there is none. A tied
    checkpoint has no tensor of a head, but answers for it with its embedding, so `head` is `lm_head.weight` there.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        model: Any = skeleton(checkpoint.path)
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self._prefix = str(model.base_model_prefix)
        paths = {id(module): path for path, module in reversed(list(self._modules.items()))}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        embedding_name = self.parameter_name(f"{paths[id(embedding)]}.weight")
        if embedding_name is None:
            raise CheckpointError(f"expected the model's embeddings in {checkpoint.path}, found none of their name")
        self.embedding = embedding_name
        self.head = None if head is None else self.parameter_name(f"{paths[id(head)]}.weight")
        self.head_bias = None if head is None else self.parameter_name(f"{paths[id(head)]}.bias")
        parameters = enumerate(model.named_parameters())
        self._order = {self.parameter_name(name): position for position, (name, _) in parameters}

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one tensor on disk."""
        return self.head == HEAD and HEAD not in self.checkpoint.names()

    def parameter_name(self, name: str) -> str | None:
        """The checkpoint's name of the parameter that a model or adapter calls `name`; `None` where there is none."""
        return next((candidate for candidate in spellings(name, self._prefix) if candidate in self.checkpoint), None)

    def require_parameter(self, name: str, key: str) -> str:
        """`parameter_name`. Raises `ArchitectureError` where there is none; `key` is what the adapter calls it."""
        known_name = self.parameter_name(name)
        if known_name is None:
            raise ArchitectureError(
                f"expected only parameters of the base, found {key} in the adapter",
                hint="the adapter was trained on another base",
            )
        return known_name

    def module(self, path: str) -> nn.Module | None:
        """The module (on the meta device) that an adapter calls `path`; `None` where there is none."""
        candidates = spellings(path, self._prefix)
        return next((self._modules[candidate] for candidate in candidates if candidate in self._modules), None)

    def sorted(self, names: set[str]) -> list[str]:
        """Parameter names in the order in which the model runs them, unknown ones last."""
        return sorted(names, key=lambda name: (self._order.get(name, len(self._order)), name))


@dataclass(frozen=True)
class LoraFactors:
    """A change `scaling · left · right` of a weight's matrix. `left [out, r]`, `right [r, in]`: the adapter's dtype."""

    left: Tensor
    right: Tensor
    scaling: float

    def scaled(self, rows: slice) -> tuple[Tensor, Tensor]:
        """`scaling · left` of these rows, and `right`: float64."""
        return self.left[rows].double() * self.scaling, self.right.double()

    def dense(self, rows: slice) -> Tensor:
        """Their product: `float32 [rows, in]`."""
        u, v = self.scaled(rows)
        return (u @ v).float()


@dataclass
class Adapter:
    """What an adapter changes, by the checkpoint's names of the base's parameters.

    `settings`: the fields of its config that the manifest keeps. `base_name`: what its config calls its base, a hub id
    or a path; empty where it calls it nothing. `trained_on`: values that the parameters had when the adapter was
    trained, where it holds them. `replaced`: values after training, of `modules_to_save`. `factors`: LoRA.
    `bias_changes`: what is added to a bias (`lora_bias`), float32. Tensors are mapped views.
    """

    folder: Path
    settings: dict[str, Any]
    base_name: str = ""
    trained_on: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, LoraFactors] = field(default_factory=dict)
    bias_changes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, base: BaseModel) -> Adapter:
        """The adapter in `folder`.

        Raises `CheckpointError` for a folder without a whole adapter, `UnsupportedModelError` for one that is not plain
        LoRA, `ArchitectureError` for one of another base, `NonFiniteError`.
        """
        config = _read_config(folder)
        tensors = _read_tensors(folder)
        settings = {name: config.get(name) for name in ("r", "lora_alpha", "use_rslora", "peft_version")}
        adapter = cls(folder, settings, str(config.get("base_model_name_or_path") or ""))
        factors: dict[str, dict[str, Tensor]] = {}  # by module, then by role
        for key, tensor in tensors.items():
            if match := _FACTOR.fullmatch(key):
                factors.setdefault(match[1], {})[match[2]] = tensor
            else:
                is_copy = _SAVED_COPY in key and key.replace(_SAVED_COPY, ".") in tensors
                adapter._add_parameter(base, key, tensor, config, is_copy=is_copy)
        if base.tied:  # embedding and head were one tensor when the adapter was trained
            for name, other in ((base.embedding, HEAD), (HEAD, base.embedding)):
                if name in adapter.trained_on:
                    adapter.trained_on.setdefault(other, adapter.trained_on[name])
        for path, by_role in factors.items():
            adapter._add_factors(base, path, by_role, config)
        return adapter

    def _add_parameter(
        self, base: BaseModel, key: str, tensor: Tensor, config: dict[str, Any], *, is_copy: bool
    ) -> None:
        """Adds a tensor that is not a factor. `is_copy`: a second copy of a saved module, which peft does not read."""
        if match := _WRAPPED.fullmatch(key):
            self.trained_on[base.require_parameter(f"{match[1]}.{match[3]}", key)] = tensor
        elif ".lora_" in key:
            raise UnsupportedModelError(f"expected the tensors of plain LoRA, found {key}: {self.folder}", hint=_MERGE)
        elif not is_copy:
            module = key.rpartition(".")[0]
            saved = any(module.endswith(name) for name in config.get("modules_to_save") or ())
            (self.replaced if saved else self.trained_on)[base.require_parameter(key, key)] = tensor

    def _add_factors(self, base: BaseModel, path: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        """The factors of the module at `path`, by their role."""
        name = base.require_parameter(f"{path}.weight", path)
        module = base.module(path)
        embedding = isinstance(module, nn.Embedding)
        roles = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        missing = [role for role in roles if role not in tensors]
        if missing or tensors.keys() - {*roles, "lora_B.bias"}:
            raise CheckpointError(
                f"expected {' and '.join(roles)} of {path}, found {', '.join(sorted(tensors))}: {self.folder}",
                hint="the adapter was not saved whole",
            )
        rank, scaling = _rank_and_scaling(path, config)
        a, b = (tensors[role] for role in roles)
        trained_on = self.trained_on.get(name)
        shape = base.checkpoint.shape(name) if trained_on is None else tuple(trained_on.shape)
        _check_factors(path, a, b, shape, rank, transposed=is_transposed(module), embedding=embedding)
        self.factors[name] = LoraFactors(a.T, b.T, scaling) if embedding else LoraFactors(b, a, scaling)
        if "lora_B.bias" in tensors and tensors["lora_B.bias"].any():
            self._add_bias_change(base, path, tensors["lora_B.bias"], scaling)

    def _add_bias_change(self, base: BaseModel, path: str, change: Tensor, scaling: float) -> None:
        bias = base.parameter_name(f"{path}.bias")
        if bias is None or tuple(change.shape) != base.checkpoint.shape(bias):
            raise UnsupportedModelError(
                f"expected a bias of the base for lora_bias to go to, found none at {path}",
                hint="a delta changes the parameters a model has, and adds none",
            )
        self.bias_changes[bias] = change.float() * scaling


def _check_factors(
    path: str, a: Tensor, b: Tensor, shape: tuple[int, ...], rank: int, *, transposed: bool, embedding: bool
) -> None:
    """Raises `ArchitectureError` for factors that do not fit a weight of this shape."""
    rows, columns = matrix_shape(shape, transposed=transposed)
    expected = ((rank, rows), (columns, rank)) if embedding else ((rank, columns), (rows, rank))
    if len(shape) != 2 or (tuple(a.shape), tuple(b.shape)) != expected:
        raise ArchitectureError(
            f"expected factors {expected[0]} and {expected[1]} of {path} for a weight {shape}, "
            f"found {tuple(a.shape)} and {tuple(b.shape)}",
            hint="the adapter was trained on another base, or its adapter_config.json is another's",
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises `UnsupportedModelError` where it is not plain LoRA."""
    path = folder / CONFIG
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(
            f"expected a peft adapter's {CONFIG} in {folder}, found {type(error).__name__}",
            hint="an adapter folder is what peft's save_pretrained writes",
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        peft_type = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UnsupportedModelError(f"expected peft_type LORA in {CONFIG}, found {peft_type}: {folder}", hint=_MERGE)
    initialization = config.get("init_lora_weights", True)
    if initialization not in _INITIALIZATIONS:
        raise UnsupportedModelError(
            f"expected init_lora_weights that leave the base as it is in {CONFIG}, found {initialization}: {folder}",
            hint="save the adapter with path_initial_model_for_weight_conversion, which makes plain LoRA of it",
        )
    for name, value in config.items():
        if name not in _KNOWN_FIELDS and value:
            raise UnsupportedModelError(
                f"expected plain LoRA in {CONFIG}, found {name} = {json.dumps(value)}: {folder}", hint=_MERGE
            )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors as mapped views, by their names without peft's prefix."""
    path = folder / WEIGHTS
    if not path.is_file():
        others = sorted(folder.glob("adapter_model.*"))
        raise CheckpointError(
            f"expected {WEIGHTS}, found {others[0].name if others else 'no adapter'} in {folder}",
            hint="pickles run code and are not read: load the adapter in peft and save it with safe_serialization=True",
        )
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            adapters = {match[0] for key in file.keys() if (match := _ADAPTER_NAME.search(key))}  # noqa: SIM118
            if len(adapters) > 1:
                found = ", ".join(sorted(name.removeprefix(".") for name in adapters))
                raise UnsupportedModelError(f"expected one adapter, found {found}: {path}", hint="save each by itself")
            for key in file.keys():  # noqa: SIM118  not a dictionary
                # A model's own state has the adapter's name in its keys, `lora_A.default.weight`.
                tensors[_ADAPTER_NAME.sub("", key.removeprefix(_PREFIX))] = file.get_tensor(key)
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
    """r and alpha / r (with `use_rslora` alpha / √r) of a module; the first pattern that matches it wins, as in peft.

    >>> _rank_and_scaling("model.layers.1.q_proj", {"r": 8, "lora_alpha": 16, "rank_pattern": {r"layers\\.1\\..*": 4}})
    (4, 4.0)
    """

    def setting(patterns: str, default: str) -> Any:
        try:
            for pattern, value in dict(config.get(patterns) or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", path):
                    return value
        except (re.error, TypeError, ValueError) as error:
            raise CheckpointError(f"expected modules and numbers in {patterns} of {CONFIG}, found {error}") from error
        return config.get(default, 8)

    rank, alpha = setting("rank_pattern", "r"), setting("alpha_pattern", "lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"expected a positive r and a number lora_alpha in {CONFIG}, found {rank} and {alpha}")
    return rank, alpha / (rank**0.5 if config.get("use_rslora") else rank)
