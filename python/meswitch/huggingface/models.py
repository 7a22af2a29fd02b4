"""Models that transformers builds from a checkpoint: with all of their weights, or as a skeleton without any."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from meswitch.errors import CheckpointError, UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.config import load_config, read_config
from meswitch.huggingface.files import has_adapter

_log = logging.getLogger(__name__)

LINEAR_MODULES = (nn.Linear, Conv1D)
"""Modules that multiply their input by a matrix `weight`; GPT-2's `Conv1D` stores it transposed."""

Check = Callable[[Any, Any], None]
"""Called with a config and a model class or model; raises if it cannot be used."""


def load_model(
    checkpoint: Checkpoint,
    dtype: str | torch.dtype = "auto",
    *,
    check: Check | None = None,
    placeholders: Mapping[str, Tensor] | None = None,
    absent: Collection[str] = (),
) -> Any:
    """The causal language model of a checkpoint, in `dtype`; `auto` is the checkpoint's own.

    Its weights are the checkpoint's and nothing else: adapter files beside them are not loaded, and code that comes
    with them is not run. `check` is called with the model's class before any weight is read, and with the model
    afterwards. `placeholders` are loaded instead of weights of those names, `absent` ones not at all.

    Raises `CheckpointError` for a checkpoint that lacks weights, and `UnsupportedModelError` if transformers knows no
    such causal language model.
    """
    try:
        config = load_config(checkpoint.path)
    except (OSError, ValueError, KeyError) as error:
        raise _unknown_model(checkpoint.path, error) from error
    known_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if check is not None and (config.is_encoder_decoder or known_class is not None):
        check(config, known_class)
    if known_class is None:
        raise UnsupportedModelError(f"{config.model_type}: not a causal language model: {checkpoint.path}")
    try:
        empty = skeleton(checkpoint.path)
        state = checkpoint.slices() | dict(placeholders or {})
        state = {name: weight for name, weight in state.items() if name not in absent}
        model, missing = load_weights(empty, state, _dtype(dtype, config, checkpoint))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.path}: expected a whole checkpoint: {error}") from error
    if has_adapter(checkpoint.path):
        _log.warning("%s: the adapter files beside the model are not loaded", checkpoint.path)
    if missing:
        raise CheckpointError(
            f"{checkpoint.path}: expected every weight of the model, found none for {missing[0]} "
            f"({len(missing)} missing)"
        )
    if check is not None:
        check(model.config, model)
    return model


def _dtype(dtype: str | torch.dtype, config: Any, checkpoint: Checkpoint) -> str | torch.dtype:
    """`dtype`, or what `auto` means where the config does not say: that of the first tensor of floats."""
    if dtype != "auto" or config.dtype is not None:
        return dtype
    dtypes = map(checkpoint.dtype, checkpoint.names())
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def load_weights(empty: Any, state: Mapping[str, Any], dtype: str | torch.dtype) -> tuple[Any, list[str]]:
    """A model like `empty` with the weights of `state`, which maps names of a checkpoint to what `[...]` reads.

    Also returns the names of weights that were missing or had another shape.
    """
    model, info = type(empty).from_pretrained(
        None, config=empty.config, state_dict=dict(state), dtype=dtype, output_loading_info=True
    )
    return model, sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])


@contextmanager
def without_parameters(classes: Collection[type[nn.Module]], names: Sequence[str]) -> Iterator[None]:
    """Meanwhile this thread makes modules of these classes without these parameters: each is an empty tensor."""
    with ExitStack() as changes:
        for kind in classes:
            changes.enter_context(_initialized_by(kind, kind.__init__, names))
        yield


@contextmanager
def _initialized_by(kind: Any, own: Any, names: Sequence[str]) -> Iterator[None]:
    thread = threading.get_ident()

    def initialize(module: Any, *args: Any, **kwargs: Any) -> None:
        own(module, *args, **kwargs)
        for name in names if threading.get_ident() == thread else ():
            del module._parameters[name]
            setattr(module, name, torch.empty(0))

    kind.__init__ = initialize
    try:
        yield
    finally:
        kind.__init__ = own


def own_weights(model: nn.Module, device: torch.device) -> None:
    """Copies the weights of a loaded model, which may be views of its files, to `device`, one at a time.

    A file that is cut or overwritten later can then neither change them nor end the process. Placeholders stay such.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        data = tensor.data
        if is_placeholder(data):
            tensor.data = placeholder(data.shape, data.dtype, device)
        else:
            tensor.data = data.to(device, copy=True)


def placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of NaNs that takes no memory: it stands for a weight that lies elsewhere. It must not be written to.

    >>> is_placeholder(placeholder((3, 4), torch.float32)), is_placeholder(torch.zeros(3, 4))
    (True, False)
    """
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(*shape)


def is_placeholder(tensor: Tensor) -> bool:
    """Whether all elements of a tensor lie in one place."""
    return tensor.numel() > 1 and not any(tensor.stride())


def skeleton(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a checkpoint on the meta device: its modules and parameter names, without weights.

    `dtype`: of its parameters; `None` takes the config's.
    Raises `CheckpointError` if transformers knows no such causal language model.
    """
    try:
        config = load_config(folder)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype, trust_remote_code=False
            )
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"expected the config.json of a causal language model in {folder}, found otherwise: {error}",
            hint="meswitch serves decoders that transformers' AutoModelForCausalLM loads",
        ) from error
    return model


def _unknown_model(folder: Path, error: Exception) -> UnsupportedModelError:
    """The error for a model that transformers does not know, with a hint where its code comes with the checkpoint."""
    has_code = "auto_map" in read_config(folder)
    hint = "the code that comes with a checkpoint is never run; serve it where that is wanted" if has_code else None
    return UnsupportedModelError(f"{folder}: transformers does not know this model: {error}", hint=hint)


def is_transposed(module: nn.Module | None) -> bool:
    """Whether a module stores its weight as `[in_features, out_features]`."""
    return isinstance(module, Conv1D)
