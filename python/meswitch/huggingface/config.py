"""The fields of a config that change what a model computes.

An expert can run on the base's modules only if none of these differs. Every field counts that is not known to be
harmless.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meswitch.errors import CheckpointError

# Read by tokenizers, generation, training or tools, or determined by the names and shapes of the weights.
HARMLESS = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping embd_pdrop embedding_dropout
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label init_std
    initializer_range label2id layerdrop length_penalty max_length max_position_embeddings min_length name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    quantization_config remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache vocab_size
    """.split()
)
# transformers resolves these into `layer_types` when it loads a config.
_ROPE_DEFAULTS: dict[str, dict[str, Any]] = {"yarn": {"beta_fast": 32, "beta_slow": 1, "truncate": True}}
_RESOLVED_FIELDS = ("max_window_layers", "sliding_window_pattern", "_sliding_window_pattern")


def parse_json(text: str | bytes) -> Any:
    """JSON as Python reads it. Text that is nested too deeply is a `ValueError` like any other that is not JSON.

    >>> parse_json('{"dtype": "bfloat16"}')
    {'dtype': 'bfloat16'}
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("arrays or objects nested too deeply") from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it is written. Raises `CheckpointError` if there is none.

    Python's JSON has Infinity and NaN, and so have configs that transformers writes.
    """
    try:
        config = parse_json((folder / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(
            f"expected a config.json in {folder}, found {type(error).__name__}",
            hint="a checkpoint folder holds config.json and model.safetensors, or shards and their index",
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"expected an object in {folder / 'config.json'}, found {type(config).__name__}")
    return config


def load_config(folder: str | Path) -> Any:
    """The config of a checkpoint as transformers loads it; code that comes with a checkpoint is never run.

    It names no quantization method. `Checkpoint` refuses weights that are quantized, so one that is named is left over
    from a base under a merged adapter, and transformers would ask for its package or quantize plain weights.

    Raises `OSError`, `ValueError` or `KeyError` if there is none that transformers knows.
    """
    # Imported here: transformers takes seconds, and the rest of this file does not need it.
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for part in (config, *vars(config).values()):  # or the config of a part of the model
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def text_config(folder: str | Path) -> Any:
    """The config of a checkpoint's decoder, with defaults and renamed fields resolved by transformers.

    Raises as `load_config` does.
    """
    return load_config(folder).get_text_config(decoder=True)


def config_changes(base: Mapping[str, Any], expert: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields of two loaded configs that differ and may matter to a forward pass, with both values.

    >>> config_changes({"rms_norm_eps": 1e-6, "use_cache": True}, {"rms_norm_eps": 1e-5, "use_cache": False})
    {'rms_norm_eps': (1e-06, 1e-05)}
    """
    missing = object()
    names = (base.keys() | expert.keys()) - HARMLESS
    if "layer_types" in base and "layer_types" in expert:
        names -= set(_RESOLVED_FIELDS)
    if not all(re.fullmatch("default|linear|llama3|none", kind) for kind in _rope_types(base)):
        names.add("max_position_embeddings")  # other rope types derive frequencies from it
    ours, theirs = ({**config, **_plain_rope(config)} for config in (base, expert))
    differing = sorted(name for name in names if not _same(ours.get(name, missing), theirs.get(name, missing)))
    return {name: (base.get(name), expert.get(name)) for name in differing}


def _same(one: Any, other: Any) -> bool:
    """Whether two values of a field are equal. NaN equals itself here."""
    return bool(one == other) or json.dumps(one, default=repr) == json.dumps(other, default=repr)


def _plain_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope settings of a config in one spelling, without what has its default value."""

    def plain(parameters: dict[str, Any]) -> dict[str, Any]:
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        defaults = _ROPE_DEFAULTS.get(kind, {}) | {"type": parameters.get("type")}
        others = {name: value for name, value in parameters.items() if value is not None}
        return {name: value for name, value in others.items() if defaults.get(name) != value} | {"rope_type": kind}

    found = {name: config[name] for name in ("rope_parameters", "rope_scaling") if isinstance(config.get(name), dict)}
    return {
        name: {key: plain(value) for key, value in rope.items()}
        if rope and all(isinstance(value, dict) for value in rope.values())
        else plain(rope)
        for name, rope in found.items()
    }


def finite(value: Any) -> Any:
    """A value for JSON: infinities and NaN, which only Python's JSON has, become their names.

    >>> finite({"limit": [0.0, float("inf")]})
    {'limit': [0.0, 'Infinity']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def json_text(value: Any) -> str:
    """JSON that any reader takes; see `finite`."""
    return json.dumps(finite(value), allow_nan=False)


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """The rope types of all layers."""
    rope = config.get("rope_parameters") or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return {str(parameters.get("rope_type", "default")) for parameters in nested or [rope]}


def context_limit(config: Any) -> tuple[int, str]:
    """The most tokens (prompt and answer) that a request may have under this text config, and the reason."""
    limit, reason = getattr(config, "max_position_embeddings", None) or 2**31 - 1, "the model's context"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]:
        kind = str(parameters.get("rope_type", "default"))
        if kind == "longrope":
            original = parameters.get("original_max_position_embeddings") or limit
            if original < limit:
                limit, reason = original, f"beyond it rope type {kind!r} would change the batch's other requests"
    return int(limit), reason
