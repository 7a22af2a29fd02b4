"""Prompts to requests: everything that can be wrong with one is found here, before any of them runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from transformers import GenerationConfig, LogitsProcessorList

from meswitch.batching.sampler import SamplingState
from meswitch.engine.encoder import PromptEncoder
from meswitch.engine.model import ServedModel
from meswitch.engine.request import Request, deadline_of, priority_of
from meswitch.engine.routing import Routing, expert_of_each
from meswitch.engine.sampling import SamplingSettings, random_generator, seed_of_each
from meswitch.engine.text import TextDecoder
from meswitch.engine.worker import Worker
from meswitch.errors import ExpertNotFoundError, MeswitchError, RequestError
from meswitch.experts.catalogue import Expert
from meswitch.experts.settings import ModelSettings


class Preparation:
    """Makes requests on the callers' threads. A request holds its expert until it is released."""

    def __init__(self, model: ServedModel, base: ModelSettings, worker: Worker, routing: Routing) -> None:
        self._model, self._worker, self._routing = model, worker, routing
        self._encoder = PromptEncoder(model, base)
        self._sound: WeakSet[ModelSettings] = WeakSet()

    def requests(
        self, prompts: list[Any], expert: str | Sequence[str] | None, keywords: dict[str, Any], *, chat: bool = False
    ) -> list[Request]:
        """A request for each prompt, or none at all. `prompts` are in the form that `engine.prompt` gives them.

        Raises `ExpertNotFoundError`, `RequestError`, `RouterError`, or what is wrong with an expert that was named.
        """
        keywords = dict(keywords)
        seeds = seed_of_each(keywords.pop("seed", None), len(prompts))
        names = expert_of_each(expert, len(prompts), routed=self._routing.available)
        deadline = deadline_of(keywords.pop("timeout", None))
        priority = priority_of(keywords.pop("priority", "interactive"))
        sampling = SamplingSettings.from_keywords(keywords)
        resolved = self._routing.resolve(names, lambda i: self._encoder.routing_text(prompts[i]))
        requests: list[Request] = []
        try:
            for prompt, (name, route), seed in zip(prompts, resolved, seeds, strict=True):
                request = self._request(prompt, name, route, sampling, seed, chat=chat)
                request.deadline, request.priority = deadline, priority
                requests.append(request)
        except BaseException:
            self.release(requests)
            raise
        return requests

    def release(self, requests: Iterable[Request]) -> None:
        """Gives the experts of requests back that will not run."""
        for request in requests:
            self._release(request.expert)

    def _release(self, expert: Expert | None) -> None:
        """On the engine's thread, where an expert that nobody uses any more is closed."""
        if expert is not None:
            self._worker.inbox.post(lambda: self._worker.pool.release(expert))

    def _request(
        self, prompt: Any, name: str, route: Any, sampling: SamplingSettings, seed: int | None, *, chat: bool
    ) -> Request:
        expert = None if name == "base" else self._acquire(name, route)
        try:
            settings = self._encoder.settings(expert)
            ids = self._encoder.encode(prompt, expert)
            limit = self._encoder.limit(len(ids), expert, sampling.max_new_tokens)
            stops, eos = self._encoder.stops(sampling.stop, expert)
            config = sampling.generation_config(settings.generation, chat=chat)
            config.max_length = len(ids) + limit  # where forced_eos_token_id stands
            outputs = self._model.outputs if expert is None else expert.outputs
            self._check_own_processors(settings, outputs, eos)
            state = SamplingState(
                self._processors(settings, config, len(ids), eos),
                outputs,
                random_generator(seed) if config.do_sample else None,
            )
            return Request(ids, expert, state, limit, eos, TextDecoder(settings.tokenizer, stops), route)
        except BaseException:
            self._release(expert)
            raise

    def _acquire(self, name: str, route: Any) -> Expert:
        try:
            return self._worker.pool.acquire(name)
        except ExpertNotFoundError as error:
            if route is None:
                raise
            raise ExpertNotFoundError(
                f"the router sends a prompt to an expert that this engine does not have: {name!r}",
                hint="add the expert, or name another one for this prompt",
            ) from error

    def _processors(
        self, settings: ModelSettings, config: GenerationConfig, prompt_tokens: int, eos: set[int], **device: str
    ) -> LogitsProcessorList:
        try:
            return self._model.logits_processors(config, prompt_tokens, eos, **device)
        except Exception as error:  # transformers raises what it likes for values that it does not take
            raise _refused(settings, error) from error

    def _check_own_processors(self, settings: ModelSettings, outputs: int, eos: set[int]) -> None:
        """Tries what a model's own generation config does to logits, once, between two steps.

        It may name tokens that the model has not, or leave none to choose: such a request is refused here. On the CPU,
        since a wrong index would end the process's use of a GPU.
        """
        if settings in self._sound:
            return
        greedy = SamplingSettings(temperature=0.0, repetition_penalty=1.0)  # what warps a draw is checked by itself
        config = greedy.generation_config(settings.generation, chat=False)
        config.max_length = 2
        processors = self._processors(settings, config, 1, eos, device="cpu")
        if processors:

            def tried() -> bool:
                ids: Any = torch.zeros(1, 1, dtype=torch.int64)
                scores: Any = torch.linspace(-8, 8, outputs)[None]
                return bool(processors(ids, scores).max().isfinite())

            try:
                usable = self._worker.call(tried)
            except MeswitchError:
                raise
            except Exception as error:  # a processor indexes with what the file says
                raise _refused(settings, error) from error
            if not usable:
                raise _refused(settings, ValueError("no token is left to choose"))
        self._sound.add(settings)


def _refused(settings: ModelSettings, error: Exception) -> RequestError:
    return RequestError(
        f"the generation config of {settings.name} cannot be used: {error}", hint="correct its generation_config.json"
    )
