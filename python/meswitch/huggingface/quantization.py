"""Checkpoints that another quantizer made: they are no input, since a delta belongs to the very weights that it was
made against.

They are told by what their files hold, not by a list of methods: codes, float8, or scales beside the weights.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from meswitch.errors import UnsupportedModelError

GGUF = ".gguf"
_INTEGERS = ("U8", "I8", "I16", "I32")  # of codes, where the config names a method: other checkpoints have such masks
_SCALE = re.compile(r"(weight|input|output|activation)\w*_scales?(_\w+)?")
_ROUNDED_AT_USE = ("bitnet", "fp_quant", "fouroversix")  # in training form: 16 bits on disk, fewer in every product
_DEQUANTIZED_BY = {
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
}
"""Methods that models are published in, without a 16-bit original, and the configs that make transformers undo them."""


def refuse_quantized(folder: Path, config: Mapping[str, Any], dtypes: Mapping[str, str], plain: Container[str]) -> None:
    """Raises `UnsupportedModelError` for a checkpoint whose weights are quantized.

    `config`: its config.json, empty if it has none. `dtypes`: of its tensors, by their names, as safetensors calls
    them. `plain`: those that weights which are not quantized may have.

    A config that names a method does not suffice: merging an adapter trained on a quantized base often leaves it there.
    """
    method, said = named_method(config)
    if method in _ROUNDED_AT_USE:
        said += ", weights that every product rounds"
    else:
        named = method is not None
        found = (f"{name} in {dtype}" for name, dtype in dtypes.items() if _is_packed(name, dtype, plain, named))
        packed = next(found, None)
        if packed is None:
            return
        said = f"{said}, {packed}" if named else packed
    raise UnsupportedModelError(
        f"expected 16- or 32-bit weights, found quantized ones ({said}): {folder}", hint=_hint(folder, method)
    )


def named_method(config: Mapping[str, Any]) -> tuple[str | None, str]:
    """The quantization method that a config names, and the field that does, as an error says it; `None` if none does.

    >>> named_method({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    ('gptq', 'quantization_config: gptq')
    """
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for field in ("quantization_config", "quantization", "compression_config"):
            settings = part.get(field)
            if isinstance(settings, dict) and settings:
                name = settings.get("quant_method") or settings.get("quant_algo") or settings.get("mode")
                method = str(name or f"{settings.get('bits', 'a few')} bits")
                return method, f"{field}: {method}"
    return None, ""


def gguf_hint(source: str | Path, file: str) -> str:
    """What to do about a GGUF file of a folder or a hub id."""
    load = f'from_pretrained("{source}", gguf_file="{file}"'
    return (
        "GGUF files are not read: give the 16-bit checkpoint that it was made from; where there is none, transformers"
        f" writes one: AutoModelForCausalLM.{load}, quantization_config=GgufConfig(dequantize=True)"
        f').save_pretrained("OUT"), and AutoTokenizer.{load}).save_pretrained("OUT")'
    )


def _is_packed(name: str, dtype: str, plain: Container[str], named: bool) -> bool:
    """Whether a tensor is part of a quantized weight. `named`: the config names a method."""
    if dtype not in plain or (named and dtype in _INTEGERS):
        return True
    # Nothing multiplies by whole numbers, and a config may have lost its method.
    if dtype in _INTEGERS and name.endswith("weight"):
        return True
    return named and _SCALE.fullmatch(name.rpartition(".")[2]) is not None


def _hint(folder: Path, method: str | None) -> str:
    """What to do about a checkpoint that is quantized."""
    if method in _ROUNDED_AT_USE:
        return "give a 16-bit model; one that was trained to be rounded, such as BitNet, has no such form"
    hint = "give the 16-bit model that it was made from; `meswitch quantize` makes a base in few bits of that"
    if method not in _DEQUANTIZED_BY:
        return hint
    config = f"quantization_config={_DEQUANTIZED_BY[method]}(dequantize=True)"
    code = f'AutoModelForCausalLM.from_pretrained("{folder}", {config}).save_pretrained("OUT")'
    return f"{hint}; where there is none, transformers writes one: {code}"
