"""Each request's own way to choose its next token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState


@dataclass
class Draw:
    """How a request chooses its next token. `vocabulary`: ids its own model knows; `generator`: none for
    greedy."""

    processors: LogitsProcessorList
    vocabulary: int
    generator: torch.Generator | None = None


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """Applies each request's own processors to its row, draws with its own generator, and leaves the drawn
    token as the row's only finite score, so that the argmax that follows picks it. Plain greedy rows are left
    alone."""

    supported_kwargs: dict[str, type] = {}  # noqa: RUF012 - the base class's own declaration
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.draws: dict[str, Draw] = {}
        self.observe: Callable[[list[str], Tensor], None] | None = None
        self._states: list[RequestState] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[FutureRequestState]) -> Tensor:
        self._states = [entry.state for entry in requests_with_new_token]
        return torch.zeros(len(self._states), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """`scores float32 [rows, vocabulary]`; rows beyond the requests with a new token belong to nobody."""
        if self.observe is not None:
            self.observe([state.request_id for state in self._states], scores)
        for row, state in enumerate(self._states):
            draw = self.draws[state.request_id]
            if draw.vocabulary < scores.shape[1]:
                # A model may squash its logits after lm_head (soft-capping), and −inf with them.
                scores[row, draw.vocabulary :] = -torch.inf
            if draw.processors or draw.generator is not None:
                token = _draw(draw, state, scores[row, : draw.vocabulary])
                scores[row] = -torch.inf
                scores[row, token] = 0.0
        return scores


def _draw(draw: Draw, state: RequestState, scores: Tensor) -> int:
    ids: Any = torch.tensor([state.initial_tokens + state.generated_tokens])
    processed = draw.processors(ids, scores[None].clone())
    if draw.generator is None:
        return int(processed.argmax())
    probabilities = processed.softmax(dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=draw.generator))
