"""Prompts to embeddings: what the first half of the base's layers makes of them, pooled over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from meswitch.errors import RequestError
from meswitch.huggingface.text import token_ids
from meswitch.progress import ProgressCallback, ProgressMeter

Embed = Callable[[list[str]], Tensor]
"""Prompts to their embeddings, `float32 [n, 2 · hidden]`: `embed` with the base and its tokenizer filled in."""
MAX_TOKENS = 512
_BATCH_TOKENS = 2048


def embed(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: ProgressCallback | None = None,
) -> Tensor:
    """What the base makes of each prompt, `float32 [n, 2 · hidden]`.

    `model` is a causal language model of transformers, also one switched to continuous batching, with no expert active;
    only half of its layers run. Of a prompt beyond `max_tokens` the first and the last half of that are read: what
    is asked stands at an end. Prompts run in padded batches of about 2,048 tokens.

    Raises `RequestError` for an empty prompt.
    """
    ids = [_prompt_ids(prompt, tokenizer, max_tokens) for prompt in prompts]
    out = torch.empty(len(ids), 2 * model.get_input_embeddings().embedding_dim)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    meter = ProgressMeter(progress, "reading prompts", len(ids))
    with _plain_attention(model), torch.no_grad():
        while order:
            # From the longest, so that a prompt runs beside others of about its length.
            batch = order[-max(1, _BATCH_TOKENS // len(ids[order[-1]])) :]
            del order[-len(batch) :]
            out[batch] = _pooled(model, [ids[i] for i in batch])
            meter.advance(len(batch))
    return out


def _prompt_ids(prompt: str, tokenizer: Any, max_tokens: int) -> list[int]:
    ids = token_ids(prompt, tokenizer)
    if not prompt.strip() or not ids:
        raise RequestError("expected a prompt to route, found an empty one")
    return ids if len(ids) <= max_tokens else ids[: max_tokens // 2] + ids[-(max_tokens - max_tokens // 2) :]


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """`paged|eager` needs the paged cache; its plain form is `eager`. Continuous batching's `sdpa` is plain."""
    name = model.config._attn_implementation
    if not str(name).startswith("paged|"):
        yield
        return
    model.set_attn_implementation(name.removeprefix("paged|"))
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def _pooled(model: Any, prompts: Sequence[list[int]]) -> Tensor:
    """Padded on the right, where a causal model's earlier tokens cannot see."""
    length = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([p + [0] * (length - len(p)) for p in prompts], device=device)
    mask = torch.tensor([[1] * len(p) + [0] * (length - len(p)) for p in prompts], device=device)
    weight = (mask / mask.sum(1, keepdim=True)).float()[:, :, None]
    states = normalize(_halfway(model, ids, mask).float(), dim=-1)
    mean = (states * weight).sum(1)
    deviation = ((states - mean[:, None]).square() * weight).sum(1).sqrt()
    return torch.cat([mean, deviation], dim=1).cpu()


class _Enough(Exception):
    """Raised by a hook to leave a forward pass whose later layers nobody needs."""


def _halfway(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The hidden states after the first half of the layers, `[n, length, hidden]`."""
    decoder = model.base_model
    count = model.config.get_text_config().num_hidden_layers
    wanted = math.ceil(count / 2)
    layers = next((m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count), None)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if layers is None:
        states: Tensor = decoder(**inputs, output_hidden_states=True, return_dict=True).hidden_states[wanted]
        return states
    seen: list[Tensor] = []

    def leave(_: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = layers[wanted - 1].register_forward_hook(leave)
    try:
        decoder(**inputs)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0]
