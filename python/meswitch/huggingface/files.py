"""The files of a checkpoint: which hold its weights, and the small ones (configs, tokenizer, chat template)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from meswitch.errors import CheckpointError
from meswitch.huggingface.config import parse_json, read_config
from meswitch.huggingface.quantization import GGUF, gguf_hint, named_method

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"

VOCABULARY = (
    *("tokenizer.json", "tokenizer.model", "tekken.json", "vocab*", "spiece.model", "sentencepiece*.model"),
    *("*.tiktoken", "*.spm", "bpe.codes"),
)
"""Files with a tokenizer's vocabulary; a folder without any of them has no tokenizer."""

TEMPLATE = ("chat_template.*",)
_TEMPLATES_FOLDER = "additional_chat_templates"  # transformers' own name
TOKENIZER = (
    *(*VOCABULARY, *TEMPLATE, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges*"),
    *("normalizer.json", "tokenization_*.py"),
)
PROCESSOR = ("processor_config.json", "*preprocessor_config.json", "audio_tokenizer_config.json")
SMALL_FILES = ("config.json", "generation_config.json", *TOKENIZER, *PROCESSOR, "*.py")
"""The files that a delta directory keeps of its fine-tune. Code is kept for others, and never run."""

HUB_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.spm", "bpe.codes", "*.py")
"""The files that are downloaded from the hub: weights, indices and small files, no pickles."""


def weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The safetensors files that transformers loads a model from, and the file of each tensor that an index lists.

    The file that the config names, else `model.safetensors`, else the shards of `model.safetensors.index.json`, in the
    order in which they are read: a tensor that several files hold is the last one's.
    Raises `CheckpointError` where there is none, or not all of it.
    """
    named = read_config(folder).get("transformers_weights") if (folder / "config.json").is_file() else None
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(f"expected a safetensors file in transformers_weights, found {named}: {folder}")
    file = next((name for name in ([str(named)] if named else [WEIGHTS, INDEX]) if (folder / name).is_file()), None)
    if file is None:
        raise _no_weights(folder)
    if not file.endswith(".index.json"):
        return [_plain_name(file, folder / "config.json")], {}
    file_of = _read_index(folder / file)
    for name, shard in file_of.items():
        if not (folder / _plain_name(shard, folder / file)).is_file():
            raise CheckpointError(f"expected the shard {shard} of {name}, found none in {folder}")
    return sorted(set(file_of.values())), file_of


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor that an index lists."""
    try:
        index = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"expected an index in JSON in {path}, found otherwise: {error}") from error
    file_of = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(file_of, dict) or not all(isinstance(file, str) for file in file_of.values()):
        raise CheckpointError(f"expected a weight_map of names and files in {path}")
    return file_of


def _plain_name(file: str, where: Path) -> str:
    """`file`, if it lies in the checkpoint's own folder. Raises `CheckpointError`."""
    if "/" in file or "\\" in file:
        raise CheckpointError(f"expected file names without folders in {where}, found {file}")
    return file


def _no_weights(folder: Path) -> CheckpointError:
    """The error for a folder without weights that can be read, with a hint to what it seems to hold."""
    found, hint = "neither", "a checkpoint folder holds config.json and model.safetensors, or shards and their index"
    if (folder / ADAPTER_CONFIG).is_file():
        hint = "this is a LoRA adapter: `meswitch import BASE ADAPTER -o DIR`"
    elif gguf := list(folder.glob(f"*{GGUF}")):
        best = max(gguf, key=lambda file: file.stat().st_size)  # of several, the least quantized
        found, hint = f"the GGUF file {best.name}", gguf_hint(folder, best.name)
    elif any(folder.glob("*.bin")):
        method, said = named_method(read_config(folder) if (folder / "config.json").is_file() else {})
        hint = "pickles run code and are not read: load the model in transformers and save it again, as safetensors"
        if method is not None:
            found, hint = f"pickles ({said})", f"{hint}; if its weights are quantized, give the 16-bit model instead"
    return CheckpointError(f"expected {WEIGHTS} or {INDEX}, found {found} in {folder}", hint=hint)


def has_adapter(folder: Path) -> bool:
    """Whether adapter files lie beside a checkpoint, left over from a merge, say. They are never loaded with it."""
    return (folder / ADAPTER_CONFIG).is_file()


def small_files(folder: Path) -> dict[str, Path]:
    """The paths of a checkpoint's small files, by name."""
    return {file.name: file for pattern in SMALL_FILES for file in folder.glob(pattern) if file.is_file()}


def carried_files(folder: Path, scratch: Path) -> dict[str, Path]:
    """`small_files`, with every chat template among them.

    A delta directory has no folders in it. Templates in `additional_chat_templates/` go, with the default one, into a
    copy of tokenizer_config.json in `scratch`, where transformers reads them as well. Raises `CheckpointError` for a
    tokenizer_config.json that is not JSON.
    """
    files = small_files(folder)
    templates = {path.stem: path for path in sorted((folder / _TEMPLATES_FOLDER).glob("*.jinja")) if path.is_file()}
    if not templates:
        return files
    if "chat_template.jinja" in files:
        templates = {"default": files.pop("chat_template.jinja"), **templates}
    path = files.get("tokenizer_config.json")
    try:
        config = {} if path is None else parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"expected JSON in {path}, found otherwise: {error}") from error
    config["chat_template"] = [
        {"name": name, "template": template.read_text(encoding="utf-8")} for name, template in templates.items()
    ]
    files["tokenizer_config.json"] = scratch / "tokenizer_config.json"
    files["tokenizer_config.json"].write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return files


def matches(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that match any of the patterns, in their order.

    >>> matches(["vocab.json", "config.json"], VOCABULARY)
    ['vocab.json']
    """
    patterns = tuple(patterns)
    return [name for name in names if any(Path(name).match(pattern) for pattern in patterns)]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any(file.is_file() for pattern in VOCABULARY for file in folder.glob(pattern))
