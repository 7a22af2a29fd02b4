"""Checkpoints whose weights are quantized already: they are no input, since a delta needs the weights themselves."""

from __future__ import annotations

from typing import Any

from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import DTYPES, Checkpoint

_PACKED = ("U8", "I8", "I32")  # codes, where the config names a method: other checkpoints have masks of these dtypes


def refuse_quantized(checkpoint: Checkpoint, side: str) -> None:
    """Raises `UnsupportedModelError` for a checkpoint with quantized weights; `side` is what it was given as.

    A config that names a method does not suffice: merging an adapter trained on a quantized base often leaves it there.
    """
    said, method = _method(checkpoint.config)
    for name in checkpoint.names():
        dtype = checkpoint.native.info(name)[0]
        if dtype not in DTYPES or (method is not None and dtype in _PACKED):
            raise UnsupportedModelError(
                f"expected 16- or 32-bit weights in the {side}, found quantized ones "
                f"({f'{said}: {method}, ' if method else ''}{name} in {dtype}): {checkpoint.path}",
                hint=f"give the 16-bit {side} that it was quantized from",
            )


def _method(config: dict[str, Any]) -> tuple[str, str | None]:
    """Which field of a config says that weights are quantized, and how; `None` if none does."""
    for field in ("quantization_config", "quantization", "compression_config"):
        settings = config.get(field)
        if isinstance(settings, dict):
            return field, str(settings.get("quant_method") or settings.get("mode") or f"{settings.get('bits')} bits")
    return "", None
