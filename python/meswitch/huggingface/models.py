"""Models that transformers builds from a checkpoint: with all of their weights, or as a skeleton without any."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from meswitch.errors import CheckpointError, UnsupportedModelError

LINEAR_MODULES = (nn.Linear, Conv1D)
"""Modules that multiply their input by a matrix `weight`; GPT-2's `Conv1D` stores it transposed."""

Check = Callable[[Any, Any], None]
"""Called with a config and a model class or model; raises if it cannot be used."""


def load_model(folder: Path, dtype: str | torch.dtype = "auto", *, check: Check | None = None) -> Any:
    """The causal language model of a checkpoint, in `dtype`; `auto` is the checkpoint's own.

    `check` is called with the model's class before any weight is read, and with the model afterwards.

    Raises `CheckpointError` for a folder without a checkpoint or one that lacks weights, and `UnsupportedModelError` if
    transformers knows no such causal language model.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: expected a checkpoint with config.json, found none")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{folder}: transformers does not know this model: {error}") from error
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if check is not None and (config.is_encoder_decoder or model_class is not None):
        check(config, model_class)
    try:
        model, missing = from_pretrained(AutoModelForCausalLM, folder, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        if model_class is None:
            raise UnsupportedModelError(f"{config.model_type}: not a causal language model: {error}") from error
        raise CheckpointError(f"{folder}: expected a whole checkpoint: {error}") from error
    if missing:
        raise CheckpointError(
            f"{folder}: expected every weight of the model, found none for {missing[0]} ({len(missing)} missing)"
        )
    if check is not None:
        check(model.config, model)
    return model


def from_pretrained(
    model_class: Any, folder: Path | None, dtype: str | torch.dtype, **arguments: Any
) -> tuple[Any, list[str]]:
    """`model_class.from_pretrained`, and the names of weights that were missing or had another shape."""
    model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True, **arguments)
    return model, sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])


def skeleton(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a checkpoint on the meta device: its modules and parameter names, without weights.

    `dtype`: of its parameters; `None` takes the config's.
    Raises `CheckpointError` if transformers knows no such causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"expected the config.json of a causal language model in {folder}, found otherwise: {error}",
            hint="meswitch serves decoders that transformers' AutoModelForCausalLM loads",
        ) from error
    return model


def is_transposed(module: nn.Module | None) -> bool:
    """Whether a module stores its weight as `[in_features, out_features]`."""
    return isinstance(module, Conv1D)
