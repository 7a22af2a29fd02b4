"""Prompts to requests: everything that can be wrong with one is found here, before any of them runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from meswitch.batching.sampler import SamplingState
from meswitch.engine.model import ServedModel
from meswitch.engine.prompt import PromptEncoder
from meswitch.engine.request import Request
from meswitch.engine.routing import Routing, expert_of_each
from meswitch.engine.sampling import SamplingSettings, random_generator, seed_of_each
from meswitch.engine.text import TextDecoder
from meswitch.engine.worker import Worker
from meswitch.experts.catalogue import Expert
from meswitch.experts.settings import ExpertSettings


class Preparation:
    """Makes requests on the callers' threads. A request holds its expert until it is released."""

    def __init__(self, model: ServedModel, settings: ExpertSettings, worker: Worker, routing: Routing) -> None:
        self._model, self._settings, self._worker, self._routing = model, settings, worker, routing
        self._encoder = PromptEncoder(model, settings)

    def requests(
        self, prompts: list[Any], expert: str | Sequence[str] | None, keywords: dict[str, Any], *, chat: bool = False
    ) -> list[Request]:
        """A request for each prompt, or none at all.

        Raises `ExpertNotFoundError`, `RequestError`, `RouterError`, or what is wrong with an expert that was named.
        """
        keywords = dict(keywords)
        seeds = seed_of_each(keywords.pop("seed", None), len(prompts))
        names = expert_of_each(expert, len(prompts), routed=self._routing.available)
        sampling = SamplingSettings.from_keywords(keywords)
        resolved = self._routing.resolve(names, lambda i: self._encoder.routing_text(prompts[i]))
        requests: list[Request] = []
        try:
            for prompt, (name, route), seed in zip(prompts, resolved, seeds, strict=True):
                requests.append(self._request(prompt, name, route, sampling, seed, chat=chat))
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
            self._worker.post(lambda: self._worker.pool.release(expert))

    def _request(
        self, prompt: Any, name: str, route: Any, sampling: SamplingSettings, seed: int | None, *, chat: bool
    ) -> Request:
        expert = None if name == "base" else self._worker.pool.acquire(name)
        try:
            ids = self._encoder.encode(prompt, expert, chat=chat)
            limit = self._encoder.limit(len(ids), expert, sampling.max_new_tokens)
            own = self._settings.generation_config(expert)
            own_stops = [own.stop_strings] if isinstance(own.stop_strings, str) else list(own.stop_strings or ())
            stops, eos = self._encoder.stops([*sampling.stop, *own_stops], expert)
            config = sampling.generation_config(own, chat=chat)
            state = SamplingState(
                self._model.logits_processors(config, len(ids), eos),
                self._model.outputs if expert is None else expert.outputs,
                random_generator(seed) if config.do_sample else None,
            )
            decoder = TextDecoder(self._settings.tokenizer(expert), stops)
            return Request(ids, expert, state, limit, eos, decoder, route)
        except BaseException:
            self._release(expert)
            raise
