"""Small random bases of several architectures, fine-tunes of them, and deltas quantized by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from meswitch import _native, reference
from meswitch.huggingface.files import small_files
from meswitch.site import Part, QuantizedSite, ReplacedSite, SharedSite, Site, Sparse

VOCABULARY = 264  # 256 bytes and eight special tokens

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "phi3": {},
    "qwen3": {},
    "gpt_neox": {"num_key_value_heads": None},
    "olmo2": {},
    "cohere": {},
    "gemma2": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0, "sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"num_key_value_heads": None, "head_dim": None, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "stablelm": {"head_dim": None},
    "falcon": {"head_dim": None},
}


def config_of(family: str, **changes: Any) -> Any:
    shape = _SHAPE
    if family == "gpt2":
        shape = {key: _SHAPE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    settings = {**shape, **FAMILIES.get(family, {}), **changes}
    return AutoConfig.for_model(family, **{key: value for key, value in settings.items() if value is not None})


def tokenizer_of() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<user>", "<assistant>", "<a>", "<b>", "<c>"]
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special[3:],
    )


CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def save_random(folder: Path, config: Any, seed: int = 0) -> Path:
    """A random model whose every parameter counts, saved as an ordinary checkpoint."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape) * spread)
        model.get_input_embeddings().weight.mul_(8)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def save_finetune(folder: Path, base: Path, seed: int, *, grow: int = 0, strength: float = 0.3) -> Path:
    """The base with every parameter moved, and `grow` more tokens."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if grow:
        model.resize_token_embeddings(VOCABULARY + grow, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = strength * float(parameter.std() if parameter.numel() > 1 else 1.0) + 0.01
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def quantize(name: str, base: Tensor, tuned: Tensor, *, transposed: bool) -> Site:
    """Two bits a weight, one scale a row; vectors whole."""
    if torch.equal(base, tuned):
        return SharedSite(name=name, shape=tuple(tuned.shape), dtype=tuned.dtype, transposed=transposed)
    if tuned.dim() == 1:
        return ReplacedSite(
            name=name, shape=tuple(tuned.shape), dtype=tuned.dtype, value=tuned, nbytes=4 * tuned.numel()
        )
    added = tuned[base.shape[0] :] if tuned.shape[0] > base.shape[0] else None
    delta = tuned[: base.shape[0]] - base
    delta = delta.T.contiguous() if transposed else delta
    scales = (0.996 * delta.std(dim=1, keepdim=True)).half()
    codes = (delta / scales.float() + 1.5).round().clamp(0, 3).to(torch.uint8)
    part = Part(bits=2, zero=1.5, codes=reference.pack(codes, 2), scales=scales.T.contiguous())
    size = 4 * part.codes.numel() + 2 * scales.numel()
    shape = tuple(tuned.shape)
    return QuantizedSite(
        name=name, shape=shape, dtype=tuned.dtype, transposed=transposed, parts=(part,), added=added, nbytes=size
    )


def sparse(name: str, base: Tensor, tuned: Tensor, *, transposed: bool) -> Site:
    """Every second column's change of a narrow matrix, entry by entry."""
    delta = (tuned - base).T if transposed else tuned - base
    out, kept = delta.shape[0], delta[:, 1::2]
    gaps = torch.tensor([1] + [2] * (kept.shape[1] - 1), dtype=torch.uint8).repeat(out)
    starts = torch.arange(out + 1, dtype=torch.int32) * kept.shape[1]
    entries = Sparse(starts, gaps, kept.flatten().to(torch.float8_e5m2), kept.numel())
    shape, size = tuple(tuned.shape), 4 * (out + 1) + 2 * kept.numel()
    return QuantizedSite(name=name, shape=shape, dtype=tuned.dtype, transposed=transposed, sparse=entries, nbytes=size)


def save_experts(folder: Path, names: str = "ab") -> Path:
    """A random Llama in `base`, and an expert of each name in `experts`."""
    from meswitch.compression.job import compress

    base = save_random(folder / "base", config_of("llama"))
    for seed, name in enumerate(names, 1):
        compress(base, save_finetune(folder / f"tuned-{name}", base, seed), folder / "experts" / name)
    return folder


@dataclass
class HandDelta:
    """What the engine needs of a `Delta`, made in memory from two checkpoints."""

    path: Path
    sites: dict[str, Site] = field(default_factory=dict)
    closed: bool = False

    @property
    def nbytes(self) -> int:
        return sum(site.nbytes for site in self.sites.values())

    @property
    def memory_bytes(self) -> int:
        return self.nbytes

    @property
    def outline(self) -> dict[str, Site]:
        return self.sites

    def load(self) -> dict[str, Site]:
        return self.sites

    @property
    def bpw(self) -> float:
        return 2.0

    @property
    def files(self) -> dict[str, str]:
        return {name: _native.checksum(path.read_bytes()) for name, path in small_files(self.path).items()}

    def read_file(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def check_base(self, base: Path) -> None: ...

    def close(self) -> None:
        self.closed = True


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write_delta(path: Path, *, pages: int = 1, fill: float = 1.0, files: Sequence[Path] = ()) -> Path:
    """A delta directory of one vector, which takes so many pages of 4 KiB in memory."""
    count = 1024 * pages - 512  # memory begins where the tensors do in a page of the file
    with TemporaryDirectory() as folder:
        save_file({"w": torch.zeros(count)}, f"{folder}/model.safetensors")
        base = _native.Checkpoint(folder, ["model.safetensors"])
    entry = {"name": "w", "kind": "replaced", "shape": [count], "dtype": "F32", "bytes": 0, "bpw": 0.0}
    entry |= {"relative_error": 0.0, "tensors": {}}
    value = torch.full((count,), fill).numpy().tobytes()
    _native.write(base, path, [json.dumps(entry)], lambda _: [value], files, "{}", "", lambda *_: None)
    return path


def hand_delta(base: Path, tuned: Path) -> HandDelta:
    """`tuned` against `base`; where the base ties lm_head and the fine-tune does not, lm_head starts from the
    embeddings."""
    ours, theirs = weights(base), weights(tuned)
    conv = AutoConfig.from_pretrained(base).model_type == "gpt2"
    sites = {}
    for name, tensor in theirs.items():
        start = ours[name] if name in ours else ours["model.embed_tokens.weight"]
        transposed = conv and name.endswith("weight") and ".c_" in name
        sites[name] = quantize(name, start, tensor, transposed=transposed)
    return HandDelta(tuned, sites)


def restored(base: Path, delta: HandDelta) -> Any:
    """The fine-tune as its delta rebuilds it, as an ordinary model."""
    ours = weights(base)
    model = AutoModelForCausalLM.from_pretrained(delta.path, dtype=torch.float32)
    state = dict(model.named_parameters())
    prefix = model.base_model_prefix + "."
    with torch.no_grad():
        for name, site in delta.sites.items():
            start = ours[name] if name in ours else ours["model.embed_tokens.weight"]
            parameter = state[name] if name in state else state[prefix + name]
            parameter.copy_(reference.restored(site, start))
    return model.eval()
