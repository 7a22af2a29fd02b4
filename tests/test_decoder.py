"""A model run a block at a time says what it says run whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from families import VOCABULARY, config_of, save_finetune, save_random
from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder, Weights
from test_moe_statistics import MOE

FAMILIES = ("llama", "qwen2", "gemma", "gpt2", "phi3", "qwen3", "gpt_neox", "olmo2", "cohere", "gemma2", "gemma3_text")
MORE = ("opt", "stablelm", "falcon", "mistral", "bloom", "mamba", "apertus")


def ids_of(windows: int = 3, length: int = 24) -> Tensor:
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(0))


def run(decoder: Decoder, weights: Weights, ids: Tensor, pieces: int = 1) -> Tensor:
    """Logits, the head in so many pieces."""
    outer, rows = decoder.outer_parameters(weights), ids.unique()
    hidden = decoder.embed(outer, rows, weights(decoder.embedding)[rows], ids)
    for at in range(len(decoder)):
        hidden = decoder.run_block(at, decoder.block_parameters(at, weights), hidden)
    x, head, bias = decoder.head_input(outer, hidden), weights(decoder.head), decoder.head_bias(weights)
    parts = torch.arange(len(head)).chunk(pieces)
    return torch.cat([decoder.logits(x, head[part], None if bias is None else bias[part]) for part in parts], -1)


@pytest.mark.parametrize("family", FAMILIES + MORE)
@torch.no_grad()
def test_logits_are_the_models_own(tmp_path: Path, family: str) -> None:
    folder = save_random(tmp_path / "model", config_of(family))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = Checkpoint.open(folder)
    decoder = Decoder(folder, checkpoint.names())
    assert decoder.vocabulary == VOCABULARY
    assert (decoder.head == decoder.embedding) == bool(model.config.tie_word_embeddings)
    for ids in (ids_of(), ids_of(2, 9)):
        wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        torch.testing.assert_close(run(decoder, checkpoint.tensor, ids), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(decoder, checkpoint.tensor, ids, pieces=3), wanted, rtol=1e-5, atol=1e-5)


def test_one_decoder_serves_the_weights_of_any_fine_tune(tmp_path: Path) -> None:
    base = save_random(tmp_path / "base", config_of("llama"))
    tuned = save_finetune(tmp_path / "tuned", base, seed=1)
    decoder = Decoder(base, Checkpoint.open(base).names())
    with torch.no_grad():
        for folder in (tuned, base):
            wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids_of()).logits
            torch.testing.assert_close(run(decoder, Checkpoint.open(folder).tensor, ids_of()), wanted)


def test_a_checkpoint_of_the_bare_decoder(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "whole", config_of("gpt2"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.transformer.save_pretrained(tmp_path / "bare")
    checkpoint = Checkpoint.open(tmp_path / "bare")
    decoder = Decoder(tmp_path / "bare", checkpoint.names())
    with torch.no_grad():
        torch.testing.assert_close(run(decoder, checkpoint.tensor, ids_of()), model(input_ids=ids_of()).logits)


def test_gradients_reach_parameters_and_hidden_states(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("gemma2"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = Checkpoint.open(folder).tensor
    decoder = Decoder(folder, Checkpoint.open(folder).names())
    outer, rows, ids = decoder.outer_parameters(weights), ids_of().unique(), ids_of()
    table, norm = weights(decoder.embedding)[rows].requires_grad_(), outer["model.norm.weight"].requires_grad_()
    inner = decoder.block_parameters(0, weights)
    name = "mlp.up_proj.weight"
    inner[name].requires_grad_()
    hidden = decoder.run_block(0, inner, decoder.embed(outer, rows, table, ids))
    hidden = decoder.run_block(1, decoder.block_parameters(1, weights), hidden)
    # The tied head is not part of this embedding's gradient: it is given apart.
    decoder.logits(decoder.head_input(outer, hidden), weights(decoder.head)).square().mean().backward()
    head = nn.Parameter(model.lm_head.weight.detach().clone())
    model.lm_head.weight = head
    model(input_ids=ids).logits.square().mean().backward()
    torch.testing.assert_close(inner[name].grad, model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(table.grad, model.model.embed_tokens.weight.grad[rows])
    torch.testing.assert_close(norm.grad, model.model.norm.weight.grad)


def test_its_own_type(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("llama"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    checkpoint = Checkpoint.open(folder)
    decoder = Decoder(folder, checkpoint.names(), dtype=None)
    with torch.no_grad():
        logits, wanted = run(decoder, checkpoint.tensor, ids_of()), model(input_ids=ids_of()).logits
    assert decoder.dtype == logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, wanted)


@pytest.mark.parametrize("family", MOE)
@torch.no_grad()
def test_stacks_of_moe_experts_are_put_together(tmp_path: Path, family: str) -> None:
    folder = save_random(tmp_path / "model", config_of(family, **MOE[family]))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint, ids = Checkpoint.open(folder), ids_of()
    wanted = model(input_ids=ids, use_cache=False).logits
    decoder = Decoder(folder, checkpoint.names())
    torch.testing.assert_close(run(decoder, checkpoint.tensor, ids), wanted, rtol=1e-5, atol=1e-5)
    owned = [name for experts in decoder.moe_experts.values() for names in experts for name in names]
    assert sorted(owned) == [name for name in checkpoint.names() if ".experts." in name]
    assert not {*owned} & {name for block in range(2) for name in decoder.block_names(block).values()}


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", config_of("mixtral"))
    names = [name for name in Checkpoint.open(folder).names() if "layers.0.block_sparse_moe.experts.3.w1." not in name]
    with pytest.raises(UnsupportedModelError, match=r"found none for 1 of \d+: model\.layers\.0\..*experts") as caught:
        Decoder(folder, names)
    assert "run whole" in str(caught.value)


def test_blocks_that_depend_on_the_text_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that hands its blocks what it made of the hidden states before them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder = save_random(tmp_path / "model", config_of("llama"))
    decoder = Decoder(folder, Checkpoint.open(folder).names())
    plain = LlamaRotaryEmbedding.forward

    def skewed(self: Any, x: Tensor, position_ids: Tensor) -> Any:
        cos, sin = plain(self, x, position_ids)
        return cos + x.mean(), sin

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", skewed)
    with pytest.raises(UnsupportedModelError, match="called alike on any text, found block 0"):
        decoder.run_block(0, decoder.block_parameters(0, Checkpoint.open(folder).tensor), torch.zeros(1, 4, 32))
