"""The base as routers ask it: prompts to embeddings, what the first half of its layers makes of them, pooled."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from meswitch.errors import RequestError
from meswitch.huggingface.text import check_vocabulary, token_ids
from meswitch.progress import ProgressCallback, ProgressMeter

T = TypeVar("T")
MAX_TOKENS = 512
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class LoadedBase:
    """A base of transformers and its tokenizer, as a `BaseModel` that runs on the calling thread.

    `progress` counts prompts that are embedded.
    """

    model: Any
    tokenizer: Any
    progress: ProgressCallback | None = None

    def embed(self, prompts: list[str]) -> Tensor:
        """`embed` with this model: `float32 [n, 2 · hidden]`."""
        return embed(self.model, self.tokenizer, prompts, progress=self.progress)

    def compute(self, function: Callable[[], T]) -> T:
        return function()


def embed(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: ProgressCallback | None = None,
    run: Callable[[Callable[[], Tensor]], Tensor] | None = None,
) -> Tensor:
    """The embedding of each prompt, `float32 [n, 2 · hidden]` on the CPU.

    Hidden states after the first half of the layers, scaled to unit length: their mean over tokens, then their
    standard deviation. `model` is a causal language model of transformers, also one switched to continuous batching,
    with no expert active; later layers do not run. Of a prompt beyond `max_tokens` tokens the first and the last half
    of that are read: a question stands at an end. Prompts run in padded batches of about 2,048 tokens.
    `run` calls what uses the model, a batch at a time, on whatever thread that may do so; without it this one does.

    Raises `RequestError` for an empty prompt, and for one with a token that the model has no row for.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [_prompt_ids(prompt, tokenizer, vocabulary, max_tokens) for prompt in prompts]
    out = torch.empty(len(ids), 2 * model.get_input_embeddings().embedding_dim)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    meter = ProgressMeter(progress, "reading prompts", len(ids))
    while order:
        # From the longest, so that a prompt runs beside others of about its length.
        batch = order[-max(1, _BATCH_TOKENS // len(ids[order[-1]])) :]
        del order[-len(batch) :]

        def fill(batch: list[int] = batch) -> Tensor:
            with _ordinary_attention(model), torch.no_grad():
                out[batch] = _pooled_states(model, [ids[i] for i in batch])
            return out

        run(fill) if run is not None else fill()
        meter.advance(len(batch))
    return out


def _prompt_ids(prompt: str, tokenizer: Any, vocabulary: int, max_tokens: int) -> list[int]:
    ids = token_ids(prompt, tokenizer)
    if not prompt.strip() or not ids:
        raise RequestError("expected a prompt to route, found an empty one")
    check_vocabulary(torch.tensor(ids), vocabulary, f"prompt {reprlib.repr(prompt)}", RequestError)
    return ids if len(ids) <= max_tokens else ids[: max_tokens // 2] + ids[-(max_tokens - max_tokens // 2) :]


@contextmanager
def _ordinary_attention(model: Any) -> Iterator[None]:
    """Replaces `paged|eager`, which needs the paged cache, by `eager` meanwhile. Continuous batching's `sdpa` works
    without."""
    name = model.config._attn_implementation
    if not str(name).startswith("paged|"):
        yield
        return
    model.set_attn_implementation(name.removeprefix("paged|"))
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def _pooled_states(model: Any, prompts: Sequence[list[int]]) -> Tensor:
    """Mean and standard deviation over each prompt's tokens, `float32 [n, 2 · hidden]`.

    Prompts are padded on the right, where a causal model's earlier tokens cannot see.
    """
    length = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([p + [0] * (length - len(p)) for p in prompts], device=device)
    mask = torch.tensor([[1] * len(p) + [0] * (length - len(p)) for p in prompts], device=device)
    weight = (mask / mask.sum(1, keepdim=True)).float()[:, :, None]
    states = normalize(_states_at_half_depth(model, ids, mask).float(), dim=-1)
    mean = (states * weight).sum(1)
    deviation = ((states - mean[:, None]).square() * weight).sum(1).sqrt()
    return torch.cat([mean, deviation], dim=1).cpu()


class _HalfDepthReached(Exception):
    """Raised by a hook to leave a forward pass whose later layers are not needed."""


def _states_at_half_depth(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The hidden states after the first half of the layers, `[n, length, hidden]`."""
    decoder = model.base_model
    count = model.config.get_text_config().num_hidden_layers
    depth = math.ceil(count / 2)
    layers = next((m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count), None)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if layers is None:
        states: Tensor = decoder(**inputs, output_hidden_states=True, return_dict=True).hidden_states[depth]
        return states
    captured: list[Tensor] = []

    def capture(_: Any, args: tuple[Any, ...], output: Any) -> None:
        captured.append(output[0] if isinstance(output, tuple) else output)
        raise _HalfDepthReached

    handle = layers[depth - 1].register_forward_hook(capture)
    try:
        decoder(**inputs)
    except _HalfDepthReached:
        pass
    finally:
        handle.remove()
    return captured[0]
