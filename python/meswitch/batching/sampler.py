"""Each request's own way to choose its next token.

Nothing here asks the device for a number in a step: a chosen token stays a tensor until transformers reads all of a
step's at once, and so does whether there was one to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from meswitch.batching.bridge import LogitsProcessor
from meswitch.errors import RequestError


@dataclass
class SamplingState:
    """How a request chooses its next token.

    `vocabulary`: how many ids its own model knows. `generator`: `None` for greedy; one on another device than the
    logits is replaced by one there, from the same seed.
    """

    processors: LogitsProcessorList
    vocabulary: int
    generator: torch.Generator | None = None
    _ids: Tensor | None = None
    _known: int = 0

    def ids(self, request: Any, device: torch.device) -> Tensor:
        """The tokens of a request so far, prompt first, for its processors to read: `int64 [1, length]`.

        Only tokens that are new since the last call are copied, so that a long answer costs no more a token.
        """
        prompt, generated = request.initial_tokens, request.generated_tokens
        length = len(prompt) + len(generated)
        if self._ids is None or self._ids.shape[1] < length:
            self._ids, self._known = torch.empty(1, 2 * length + 64, dtype=torch.int64, device=device), 0
        new = [*prompt[self._known :], *generated[max(self._known - len(prompt), 0) :]]
        self._ids[0, self._known : length] = torch.tensor(new, dtype=torch.int64)
        self._known = length
        return self._ids[:, :length]

    def generator_on(self, device: torch.device) -> torch.Generator | None:
        if self.generator is not None and self.generator.device != device:
            self.generator = torch.Generator(device).manual_seed(self.generator.initial_seed())
        return self.generator


def logits_processors(
    model: Any, settings: GenerationConfig, prompt_tokens: int, eos: Iterable[int], device: torch.device | str
) -> LogitsProcessorList:
    """The logits processors that `settings` ask for, after a prompt of `prompt_tokens` tokens; ids of `eos` end it."""
    ids = sorted(eos)
    settings._eos_token_tensor = torch.tensor(ids, device=device) if ids else None
    processors: LogitsProcessorList = model._get_logits_processor(
        settings, input_ids_seq_length=prompt_tokens, device=device
    )
    return processors


class RequestSampler(LogitsProcessor):
    """Applies each request's own processors to its row, draws with its own generator, and leaves the drawn token as the
    row's only finite score, so that the argmax that follows picks it. Plain greedy rows are left alone.

    A row that cannot be sampled is one request's trouble: it gets some token, and `failures` says after the step that
    it means nothing. `states`: by request id, from before a request is added until it is gone. `observe` sees the ids
    of the requests and the logits before anything is changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, SamplingState] = {}
        self.observe: Callable[[list[str], Tensor], None] | None = None
        self._failures: dict[str, RequestError] = {}
        self._usable: dict[str, Tensor] = {}

    def process(self, scores: Tensor, requests: Sequence[Any]) -> Tensor:
        self._failures, self._usable = {}, {}
        if self.observe is not None:
            self.observe([request.request_id for request in requests], scores)
        states = [self.states[request.request_id] for request in requests]
        for row, state in enumerate(states):
            if state.vocabulary < scores.shape[1]:
                # A model may squash its logits after lm_head (soft-capping), and −inf with them.
                scores[row, state.vocabulary :] = -torch.inf
        usable = scores[: len(states)].amax(dim=1, keepdim=True) > -torch.inf  # not where a logit is NaN
        for row, (state, request) in enumerate(zip(states, requests, strict=True)):
            self._usable[request.request_id] = usable[row]
            if state.processors or state.generator is not None:
                try:
                    token, self._usable[request.request_id] = _choose(state, request, scores[row, : state.vocabulary])
                    scores[row] = -torch.inf
                    scores[row].index_fill_(0, token, 0.0)
                except Exception as error:  # processors do what an expert's own file says
                    self._failures[request.request_id] = _failed(f"{type(error).__name__}: {error}")
        return scores

    def failures(self) -> dict[str, RequestError]:
        """By id, the requests whose token of the last step means nothing. Asked after the step, whose tokens have been
        read from the device by then."""
        if self._usable and not torch.cat(list(self._usable.values())).all():
            for request_id, usable in self._usable.items():
                if not usable and request_id not in self._failures:
                    self._failures[request_id] = _failed("expected finite probabilities, found NaN or infinity")
        failures, self._failures, self._usable = self._failures, {}, {}
        return failures


def _choose(state: SamplingState, request: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of a request with the logits `scores [vocabulary]`: `int64 [1]`; `bool [1]`: whether there was
    one to choose."""
    processed = scores[None].clone()
    if state.processors:
        ids: Any = state.ids(request, scores.device)
        processed = state.processors(ids, processed)
    generator = state.generator_on(scores.device)
    likeliest = processed.argmax().view(1)
    best = processed[0, likeliest]  # NaN where any score is
    if generator is None:
        return likeliest, best > -torch.inf
    usable = best.isfinite()
    # Drawing from a NaN would end the process's use of a GPU, so it is drawn from something else.
    probabilities = processed.softmax(dim=-1).where(usable, 1.0)
    return torch.multinomial(probabilities, 1, generator=generator)[0], usable


def _failed(why: str) -> RequestError:
    return RequestError(
        f"sampling failed: {why}",
        hint="check the sampling settings, and the expert's generation_config.json and weights",
    )
