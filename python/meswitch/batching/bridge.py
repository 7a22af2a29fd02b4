"""What continuous batching can serve."""

from __future__ import annotations

from typing import Any

import torch

from meswitch.batching.cache import cache_geometry
from meswitch.errors import UnsupportedModelError


def check_supported(config: Any, model: Any) -> None:
    """Raises `UnsupportedModelError` for what continuous batching would answer wrongly.

    `model`: the model, its class, or none.
    """
    name = config.model_type if model is None else getattr(model, "__name__", type(model).__name__)
    text = config.get_text_config(decoder=True)
    reason = None
    if config.is_encoder_decoder:
        reason = "it is an encoder-decoder model"
    elif getattr(model, "_is_stateful", False):
        reason = "its state is more than a cache of keys and values"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "its attention ignores the paged cache (no attention backend)"
    elif getattr(text, "num_kv_shared_layers", 0):
        reason = "its layers share keys and values"
    elif getattr(text, "kv_lora_rank", None) is not None:
        reason = "its keys and values are latent (kv_lora_rank)"
    if reason is not None:
        raise UnsupportedModelError(f"{name} cannot run under continuous batching: {reason}")
    cache_geometry(text, torch.float32)


class _Silent:
    """Stands in for transformers' output router: the engine takes tokens from the step itself."""

    def deliver(self, output: Any) -> None: ...

    def deliver_batch(self, outputs: Any) -> None: ...

    def fail_and_deliver(self, state: Any, error: Exception) -> None: ...
