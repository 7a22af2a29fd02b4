"""Every causal language model of transformers, tiny and random: served as it is alone, or refused by name.

    python tests/causal_models.py    tries them and writes docs/models.md

A config is the class's own default with its sizes made small; a kind of layer that it has once stays.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from meswitch.batching.attention import plain_attention
from meswitch.batching.compatibility import check_supported
from meswitch.engine.engine import Engine
from meswitch.errors import UnsupportedModelError

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
VOCABULARY, WINDOW, NEW_TOKENS, STEP_TOKENS = 264, 12, 6, 24
PROMPTS = (41, 7)  # tokens; the first is longer than a step and than three windows
FARTHEST = 1e-4  # of the largest logit

# The first pattern that fits a field's name says how large it becomes; fields that are smaller stay.
_SIZES = (
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length", 256),
    (r"vocab_size|vocab_size_per_layer_input|pretraining_vocab_size", VOCABULARY),
    (r"(num_)?(attention_)?heads|num_attention_heads|n_heads?", 4),
    (r".*num_key_value_heads|kv_n_heads", 2),
    (r"rotary_dim", 4),
    (r".*head_dim|head_size", 8),
    (r"hidden_size|d_model|n_embd|embedding_size|word_embed_proj_dim|embed_dim|width|out_hidden_size|proj.*_dim", 32),
    (r".*intermediate_size|ffn_dim|n_inner|.*ffn_hidden_size|depth", 48),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|n_group|topk_group", 4),
    (r"num_experts_per_tok|moe_top_k|moe_topk|moe_k", 2),
    (r".*sliding_window|sliding_window_size|window_size", WINDOW),
    (r"patch_size", 4),
    (r"image_size", 8),
)
_TOKEN_IDS = {"bos": 256, "eos": 257, "pad": 3}
# Fields whose default leaves a model that cannot be built, or one that does not use what it is known for.
_CHANGES: dict[str, dict[str, Any]] = {
    "beam": {"n_group": 2, "topk_group": 1},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0}},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dory": {
        "layer_types": None,
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
}


@dataclass(frozen=True)
class Case:
    """A model and fields of its config that are not the default's."""

    model_type: str
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.model_type, *(f"{name}={value}" for name, value in self.changes)])


@dataclass(frozen=True)
class Verdict:
    """`answer`: one of `SERVED`, `REFUSED`, `UNTRIED` and `WRONG`; `why` for all but the first."""

    answer: str
    why: str = ""


SERVED, REFUSED, UNTRIED, WRONG = "served", "refused", "not tried", "wrong"


def model_types() -> list[str]:
    """Those that have a causal class, each once."""
    return [name for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if CONFIG_MAPPING[name].model_type == name]


def model_class(model_type: str) -> Any:
    """What transformers loads; only this one is imported."""
    found = AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[model_type]]
    return found[0] if isinstance(found, tuple | list) else found


def cases() -> Iterator[Case]:
    """A default config of every class, and those with a window or as a decoder where the default is neither."""
    for model_type in model_types():
        yield Case(model_type)
        try:
            default = CONFIG_MAPPING[model_type]()
            check_supported(default, model_class(model_type))
        except Exception:  # said by the case itself
            continue
        fields = default.to_dict()
        if fields.get("is_decoder") is False:
            yield Case(model_type, (("is_decoder", True),))
        if fields.get("use_sliding_window") is False:
            yield Case(model_type, (("use_sliding_window", True), ("sliding_window", WINDOW), ("max_window_layers", 1)))
        elif fields.get("sliding_window", WINDOW) is None and "layer_types" not in fields:
            yield Case(model_type, (("sliding_window", WINDOW),))


def tiny_config(case: Case) -> Any:
    default = CONFIG_MAPPING[case.model_type]()
    changes = {**_CHANGES.get(case.model_type, {}), **dict(case.changes)}
    return type(default).from_dict({**_shrunk(default.to_dict()), **changes})


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    kinds = fields.get("layer_types") or []
    kept = sorted(kinds.index(kind) for kind in set(kinds))
    kept += range(len(kept), 2) if not kinds else kept[: 2 - len(kept)]
    depth = next((name for name in ("num_hidden_layers", "n_layers", "n_layer", "num_layers") if name in fields), "")
    small = {}
    for name, value in fields.items():
        if name in ("transformers_version", "architectures", "dtype"):
            continue
        if name.endswith("token_id") and value is not None:
            value = _TOKEN_IDS.get(name.split("_")[0], 258)
        elif name == depth:
            value = len(kept)
        elif name == "rope_parameters" and isinstance(value, dict) and value.get("rope_theta", 0) is None:
            value = {**value, "rope_theta": 10_000.0}
        elif isinstance(value, dict):
            value = _shrunk(value) if "model_type" in value else value
        elif isinstance(value, list) and len(value) == fields.get(depth):
            value = [value[layer] for layer in kept]
        elif isinstance(value, int) and not isinstance(value, bool):
            value = min([value, *(size for pattern, size in _SIZES if re.fullmatch(pattern, name))][:2])
        small[name] = value
    return small


def save_tiny(case: Case, folder: Path) -> None:
    """A model whose every parameter counts; attention matters as much as the token itself."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(case), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.8 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape) * spread)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)


def try_case(case: Case) -> Verdict:
    """Builds a case's model and serves it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if not case.changes:
                check_supported(CONFIG_MAPPING[case.model_type](), model_class(case.model_type))
            save_tiny(case, folder)
        except UnsupportedModelError as error:
            return Verdict(REFUSED, _reason(error))
        except Exception as error:
            return Verdict(UNTRIED, f"{type(error).__name__}: {_reason(error)}")
        try:
            apart = difference(folder)
        except UnsupportedModelError as error:
            return Verdict(REFUSED, _reason(error))
        except Exception as error:
            return Verdict(WRONG, f"{type(error).__name__}: {_reason(error)}")
        return Verdict(SERVED) if apart <= FARTHEST else Verdict(WRONG, f"logits are {apart:.2g} off")


def _reason(error: Exception) -> str:
    """The first sentence of an error, without the model's name and folder."""
    text = re.sub(rf"(: )?{re.escape(tempfile.gettempdir())}\S*", "", " ".join(str(error).split()))
    before, _, after = text.partition("cannot run under continuous batching: ")
    return re.split(r"(?<=\w)\. |\.$", after or before)[0].replace("|", "/")


def difference(folder: Path) -> float:
    """How far logits of two requests in one batch are from those of the model alone, as a share of the largest."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(10, 250, (length,), generator=generator).tolist() for length in PROMPTS]
    rows: dict[str, list[Tensor]] = {}

    def observe(ids: list[str], scores: Tensor) -> None:
        for row, request in enumerate(ids):
            rows.setdefault(request, []).append(scores[row].clone())

    with Engine(folder, kv_budget="16MiB", max_batch_tokens=STEP_TOKENS) as engine:
        engine._worker.sampler.observe = observe
        answers = engine.generate(prompts, max_new_tokens=NEW_TOKENS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation(plain_attention(model))
    farthest = 0.0
    for prompt, answer, seen in zip(prompts, answers, sorted(rows.items(), key=_number), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.token_ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.float()
        farthest = max(farthest, float((torch.stack(seen[1]) - expected).abs().max() / expected.abs().max()))
    return farthest


def _number(item: tuple[str, Any]) -> int:
    return int(item[0].split("-")[1])


def page(verdicts: dict[Case, Verdict]) -> str:
    counts = {answer: sum(verdict.answer == answer for verdict in verdicts.values()) for answer in (SERVED, REFUSED)}
    rows = [
        f"| `{case}` | `{model_class(case.model_type).__name__}` | {': '.join(filter(None, vars(verdict).values()))} |"
        for case, verdict in verdicts.items()
    ]
    return _HEAD.format(version=transformers.__version__, **counts, prompts=PROMPTS, step=STEP_TOKENS) + "\n".join(
        [*rows, ""]
    )


_HEAD = """# Models

What the engine does with each class that `AutoModelForCausalLM` of transformers {version} has: {served} configs are
served, {refused} are refused with an `UnsupportedModelError` when the engine starts.

`make test-models` tries them: a tiny random model with every kind of layer of the class's default config, in float32,
two prompts of {prompts[0]} and {prompts[1]} tokens in one batch, in steps of {step} tokens. *Served* means that every
row of logits is that of the model alone. A config that is tried in more than one form has a row for each. Real
checkpoints can have kinds of layers that the default has not; such a checkpoint is refused by the same checks. Whether
every weight of a fine-tune can be served is checked when its delta is opened.

`python tests/causal_models.py` writes this page.

## Quantized checkpoints

A delta belongs to the very weights that it was made against, so base and fine-tune are given in 16 or 32 bits. For a
base in few bits, `meswitch quantize` the 16-bit one.

What another quantizer made is refused by name, wherever a checkpoint is given and before its weights are read:
bitsandbytes, GPTQ, AWQ, torchao, fp8, compressed-tensors, MXFP4, MLX, and any other that stores codes, float8 or scales
beside the weights. BitNet is refused in 16 bits too, since its weights are rounded in every product. A config that
names a method over plain 16-bit weights, as merged adapters leave it, changes nothing.

Where a model is published in few bits alone, transformers writes a 16-bit checkpoint of it, and the error says how:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

model = AutoModelForCausalLM.from_pretrained("base", quantization_config=Mxfp4Config(dequantize=True))
model.save_pretrained("base-16bit")
AutoTokenizer.from_pretrained("base").save_pretrained("base-16bit")
```

`FineGrainedFP8Config` does that for fp8 and `CompressedTensorsConfig` for compressed-tensors. GGUF files, which need
`pip install gguf accelerate`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

undone = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained("folder", gguf_file="model.gguf", quantization_config=undone)
model.save_pretrained("base-16bit")
AutoTokenizer.from_pretrained("folder", gguf_file="model.gguf").save_pretrained("base-16bit")
```

Such a checkpoint is a base of its own: deltas that were made against the original 16-bit weights do not fit it.

## Classes

| model type | class | |
|---|---|---|
"""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    verdicts = {}
    for case in cases():
        verdicts[case] = try_case(case)
        print(case, *vars(verdicts[case]).values(), flush=True)
    PAGE.write_text(page(verdicts), encoding="utf-8")
