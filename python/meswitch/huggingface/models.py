"""Models as transformers makes them from a checkpoint: whole or not at all, or as a skeleton without weights."""

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
"""Called with a config and a model class or model; raises where it cannot be used."""


def load_model(folder: Path, dtype: str | torch.dtype = "auto", *, check: Check | None = None) -> Any:
    """The causal language model of a checkpoint, in the checkpoint's own dtype or in `dtype`.

    `check` is asked before any weight is read, with the model's class, and again with the model.

    Raises `CheckpointError` where a weight is missing or the folder holds no checkpoint, `UnsupportedModelError` where
    transformers knows no such causal language model.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: expected a checkpoint with config.json, found none")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedModelError(f"{folder}: transformers does not know this model: {error}") from error
    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if check is not None and (config.is_encoder_decoder or kind is not None):
        check(config, kind)
    try:
        model, missing = built(AutoModelForCausalLM, folder, dtype)
    except (OSError, ValueError, SafetensorError) as error:
        if kind is None:
            raise UnsupportedModelError(f"{config.model_type}: not a causal language model: {error}") from error
        raise CheckpointError(f"{folder}: expected a whole checkpoint: {error}") from error
    if missing:
        raise CheckpointError(
            f"{folder}: expected every weight of the model, found none for {missing[0]} ({len(missing)} missing)"
        )
    if check is not None:
        check(model.config, model)
    return model


def built(kind: Any, folder: Path | None, dtype: str | torch.dtype, **state: Any) -> tuple[Any, list[str]]:
    """`kind.from_pretrained`, and the names of the weights that it did not find in their shape."""
    model, found = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **state)
    return model, sorted(found["missing_keys"]) + sorted(str(key) for key in found["mismatched_keys"])


def skeleton(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a checkpoint without its weights: its modules and parameter names, on the meta device.

    `dtype` is its parameters', the config's own by default.

    Raises `CheckpointError` where transformers knows no such causal language model.
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
