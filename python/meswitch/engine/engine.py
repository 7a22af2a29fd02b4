"""Engine: one base and many experts answer requests in one batch.

    callers ── Request ──> inbox        one thread, which loaded the model and runs every step
                             └─> admit ─> schedule ─> forward ─> sample ─> text ──> Request.pieces ──> callers
    callers ── jobs (add an expert, embed for the router) ──> between steps

The thread is the only one that enters torch's parallel regions: a second team of OpenMP threads in the
process would slow every operation.
"""

from __future__ import annotations

import copy
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from meswitch.batching.sampler import Draw
from meswitch.engine.request import Answer, Request
from meswitch.engine.sampling import SHAPING, check_sampling, check_seed, whole
from meswitch.engine.stream import TextStream
from meswitch.engine.text import TextTail
from meswitch.engine.worker import Settings, Worker, closed, generation_config
from meswitch.errors import CudaUnavailableError, RequestError, RouterError
from meswitch.experts.catalogue import Expert
from meswitch.experts.pool import ExpertPool
from meswitch.huggingface.checkpoint import resolve
from meswitch.huggingface.config import context_limit
from meswitch.huggingface.files import has_tokenizer
from meswitch.huggingface.text import load_tokenizer
from meswitch.sizes import parse_bytes

__all__ = ["Answer", "Engine", "TextStream"]
Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


class Engine:
    """Serves a base and its experts from one thread.

    `base`: a folder or hub id. `experts`: a folder of delta directories (one sub-folder an expert; a broken
    one is listed with its error and takes no other down), a list of delta directories, or `{name:
    directory}`. `router`: a folder or an object with `route`, for `expert="auto"`. `exact` asks for the
    reference's arithmetic. Budgets are bytes, or text such as `"8GiB"`: `host_budget` over the resident
    deltas (no bound without), `kv_budget` over the KV cache with its masks and indices (without: what four
    full contexts need, 1 GiB at most). `max_batch_tokens`: the tokens of one step, so longer prompts are
    split.

    A context manager; raises `UnsupportedModelError`, `BudgetError`, `RequestError`, and what is wrong with
    an expert that was named.
    """

    def __init__(
        self,
        base: str | Path,
        experts: str | Path | Iterable[str | Path] | Mapping[str, str | Path] | None = None,
        router: Any = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        exact: bool = False,
        host_budget: int | str | None = None,
        device_budget: int | str | None = None,
        kv_budget: int | str | None = None,
        *,
        kernels: str = "auto",
        max_batch_tokens: int = 512,
    ) -> None:
        if torch.device(device).type != "cpu":
            raise CudaUnavailableError(
                f'expected device="cpu", found {device!r}', hint="this version serves on the CPU"
            )
        parse_bytes(device_budget, "device_budget")
        settings = Settings(
            base=Path(resolve(base)),
            dtype=dtype,
            exact=exact,
            kernels=kernels,
            device=device,
            host_budget=parse_bytes(host_budget, "host_budget"),
            kv_budget=parse_bytes(kv_budget, "kv_budget"),
            max_batch_tokens=whole("max_batch_tokens", max_batch_tokens, least=1),
        )
        self._router = _open_router(router, settings.base)
        self._worker = Worker(settings)
        self._finalizer = weakref.finalize(self, self._worker.stop)
        self._encoding = threading.RLock()
        self._base_extras: dict[str, Any] = {}
        self._worker.start()
        try:
            self._worker.ready.result()
            self._worker.call(lambda: self._pool.discover(experts))
        except BaseException:
            self.close()
            raise

    # experts

    @property
    def _pool(self) -> ExpertPool:
        return self._worker.pool

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """By name: `path`, `residency`, `bytes`, `bpw`, `uses`, `served`, and the `error` of one that is
        broken."""
        return self._pool.describe()

    def add_expert(self, name: str, path: str | Path) -> None:
        """Adds or replaces an expert; requests in flight finish on the one they began with."""
        self._worker.call(lambda: self._pool.add(name, Path(path)))

    def remove_expert(self, name: str) -> None:
        """Removes an expert; requests in flight finish on it. Raises `ExpertNotFoundError`."""
        self._worker.call(lambda: self._pool.remove(name))

    def stats(self) -> dict[str, Any]:
        """Counters since the start; sizes in bytes."""
        worker = self._worker
        return {
            "requests": {
                "waiting": len(worker.waiting),
                "running": len(worker.live),
                "finished": worker.finished,
                "failed": worker.failed,
            },
            "steps": worker.steps,
            "step_tokens": worker.step_tokens,
            "kv": {"bytes": worker.plan.nbytes, "tokens": worker.kv_tokens},
            "host": self._pool.counters(),
            "experts": self.experts,
        }

    def close(self) -> None:
        """Ends the engine's thread after the running step; requests still in flight fail."""
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # requests

    def generate(
        self, prompt: Prompt | Sequence[Prompt], expert: str | Sequence[str] | None = None, **sampling: Any
    ) -> Any:
        """Answers one prompt (an `Answer`) or a list of them (a list, in order), all in one batch.

        A prompt is text or a list of token ids. `expert`: a name, `"base"`, `"auto"` (the router chooses), or
        one of these for each prompt; without it `"auto"` where the engine has a router, else `"base"`.

        Sampling, alike for `stream` and `chat`: `max_new_tokens` (256), `temperature`, `top_k`, `top_p`,
        `min_p`, `repetition_penalty`, `stop` (a string or several), `seed` (one for all prompts or one each;
        the same seed gives the same text whoever else is in the batch). What is not given comes from the
        expert's generation_config.json, but `generate` and `stream` are greedy unless `temperature` is above
        0 or `top_k`, `top_p` or `min_p` is given; `chat` samples where that file says `do_sample`.
        `temperature=0` is greedy.

        Raises `ExpertNotFoundError`, `RequestError`, `RouterError`, and what a failed step raised.
        """
        single = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
        prompts: list[Any] = [prompt] if single else list(prompt)
        answers = self._answers(self._requests(prompts, expert, sampling))
        return answers[0] if single else answers

    def stream(self, prompt: Prompt, expert: str | None = None, **sampling: Any) -> TextStream:
        """The answer to one prompt as pieces of text; arguments as in `generate`."""
        return self._stream(self._requests([prompt], expert, sampling)[0])

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        expert: str | Sequence[str] | None = None,
        *,
        stream: bool = False,
        **sampling: Any,
    ) -> Any:
        """Answers a conversation (`[{"role": ..., "content": ...}, ...]`) under the expert's own chat
        template; a list of conversations as one batch, `expert` as in `generate`.

        An `Answer`, a list of them for a list, or a `TextStream` with `stream=True` (one conversation only).
        """
        batch: Any = messages
        single = not batch or isinstance(batch[0], Mapping)
        if stream and not single:
            raise RequestError(f"stream: expected one conversation, found {len(batch)}")
        requests = self._requests([batch] if single else list(batch), expert, sampling, chat=True)
        if stream:
            return self._stream(requests[0])
        answers = self._answers(requests)
        return answers[0] if single else answers

    def _answers(self, requests: list[Request]) -> list[Answer]:
        self._submit(requests)
        try:
            return [request.result() for request in requests]
        finally:
            self._cancel(request for request in requests if not request.done.is_set())

    def _stream(self, request: Request) -> TextStream:
        self._submit([request])
        return TextStream(request, lambda request: self._cancel([request]))

    def _submit(self, requests: list[Request]) -> None:
        try:
            self._worker.submit(requests)
        except BaseException:
            self._give_back(requests)
            raise

    def _cancel(self, requests: Iterable[Request]) -> None:
        pending = list(requests)
        if pending:
            self._worker.post(lambda: self._worker.cancel(pending))

    def _give_back(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.expert is not None:
                self._give_up(request.expert)

    def _give_up(self, expert: Expert) -> None:
        self._worker.post(lambda: self._pool.let_go(expert))

    def _requests(
        self,
        prompts: list[Any],
        expert: str | Sequence[str] | None,
        sampling: dict[str, Any],
        *,
        chat: bool = False,
    ) -> list[Request]:
        """Everything that can be wrong with a request is found here, before any of them runs."""
        if not self._worker.open:
            raise closed()
        names = self._names(expert, len(prompts))
        seeds = sampling.pop("seed", None)
        each = list(seeds) if isinstance(seeds, list | tuple) else [seeds] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"seed: expected one, or one for each of {len(prompts)} prompts, found {len(each)}")
        checked = check_sampling(sampling)
        requests: list[Request] = []
        try:
            for prompt, (name, route), seed in zip(prompts, self._routed(prompts, names), each, strict=True):
                requests.append(self._request(prompt, name, checked, check_seed(seed), chat=chat))
                requests[-1].route = route
        except BaseException:
            self._give_back(requests)
            raise
        return requests

    def _names(self, expert: str | Sequence[str] | None, count: int) -> list[str]:
        if expert is None:
            expert = "base" if self._router is None else "auto"
        names = [expert] * count if isinstance(expert, str) else list(expert)
        if len(names) != count:
            raise RequestError(f"expert: expected one, or one for each of {count} prompts, found {len(names)}")
        return names

    def _routed(self, prompts: list[Any], names: list[str]) -> list[tuple[str, Any]]:
        """(name, route) of every prompt; the router sees those that ask for `"auto"`, together."""
        asking = [i for i, name in enumerate(names) if name == "auto"]
        routed: list[tuple[str, Any]] = [(name, None) for name in names]
        if not asking:
            return routed
        if self._router is None:
            raise RouterError('expert="auto" needs a router', hint="pass router=... to Engine, or name an expert")
        texts = [self._routing_text(prompts[i]) for i in asking]
        for i, route in zip(asking, self._router.route(texts, self._embed), strict=True):
            routed[i] = ("base" if route.abstained else route.expert, route)
        return routed

    def _routing_text(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        if prompt and isinstance(prompt[0], Mapping):
            said = [str(message.get("content", "")) for message in prompt if message.get("role") == "user"]
            return said[-1] if said else ""
        return str(self._tokenizer(None).decode(list(prompt)))

    def _embed(self, prompts: list[str]) -> Tensor:
        """The base's hidden states, computed on the engine's thread with no expert active."""
        from meswitch.router.embedding.pooling import embed

        return self._worker.plainly(lambda: embed(self._worker.model, self._tokenizer(None), prompts))

    def _request(self, prompt: Any, name: str, sampling: dict[str, Any], seed: int | None, *, chat: bool) -> Request:
        expert = None if name == "base" else self._pool.hold(name)
        try:
            ids = self._encode(prompt, expert, chat=chat)
            limit = self._room(len(ids), expert, sampling["max_new_tokens"])
            generation = self._generation(expert)
            eos = self._eos(generation, expert)
            own = generation.stop_strings or []
            stops = self._stops(sampling["stop"] + ([own] if isinstance(own, str) else list(own)), expert, eos)
            draw = self._draw(ids, expert, generation, sampling, seed, eos, chat=chat)
            request = Request(ids, expert, draw, limit, eos)
            request.tail = TextTail(self._tokenizer(expert, missing_ok=True), stops)
            return request
        except BaseException:
            if expert is not None:
                self._give_up(expert)
            raise

    def _room(self, prompt: int, expert: Expert | None, wanted: int) -> int:
        """How many tokens may follow a prompt of `prompt` tokens, at most `wanted`."""
        config = self._worker.text_config if expert is None or expert.config is None else expert.config
        context, why = context_limit(config)
        kv = self._worker.kv_tokens
        for limit, reason, hint in (
            (context, why, "shorten the prompt"),
            (kv, f"kv_budget ({self._worker.plan.nbytes} bytes)", "shorten the prompt or raise kv_budget"),
        ):
            if prompt >= limit:
                raise RequestError(
                    f"the prompt is too long: expected less than {limit} tokens ({reason}), found {prompt}",
                    hint=hint,
                )
        return min(wanted, context - prompt, kv - prompt)

    # what belongs to an expert

    def _own(self, expert: Expert | None, what: str, load: Callable[[Path], Any]) -> Any:
        """Something read once from the expert's folder, or the base's."""
        extras = self._base_extras if expert is None else expert.extras
        with self._encoding:
            if what not in extras:
                folder = self._worker.settings.base if expert is None else expert.path
                extras[what] = load(folder) if folder is not None else None
            return extras[what]

    def _tokenizer(self, expert: Expert | None, *, missing_ok: bool = False) -> Any:
        tokenizer = self._own(expert, "tokenizer", _load_tokenizer)
        if tokenizer is None and expert is not None:
            return self._tokenizer(None, missing_ok=missing_ok)
        if tokenizer is None and not missing_ok:
            raise RequestError("the base has no tokenizer files", hint="pass prompts as lists of token ids")
        return tokenizer

    def _generation(self, expert: Expert | None) -> GenerationConfig:
        own = self._own(expert, "generation", _load_generation)
        return own if own is not None else (generation_config() if expert is None else self._generation(None))

    def _eos(self, generation: GenerationConfig, expert: Expert | None) -> set[int]:
        config = self._worker.text_config if expert is None or expert.config is None else expert.config
        tokenizer = self._tokenizer(expert, missing_ok=True)
        for owner in (generation, config, tokenizer):
            ids = getattr(owner, "eos_token_id", None)
            if ids is not None:
                return {int(i) for i in (ids if isinstance(ids, list | tuple) else [ids])}
        return set()

    def _stops(self, stops: list[str], expert: Expert | None, eos: set[int]) -> list[str]:
        """Stop strings; one that is a special token, which text never shows, becomes an end-of-sequence id
        instead."""
        if not stops:
            return []
        tokenizer = self._tokenizer(expert)
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        eos |= {int(tokenizer.convert_tokens_to_ids(stop)) for stop in stops if stop in special}
        return [stop for stop in stops if stop not in special]

    def _encode(self, prompt: Any, expert: Expert | None, *, chat: bool) -> list[int]:
        if chat:
            ids = self._encode_chat(prompt, expert)
        elif isinstance(prompt, str):
            tokenizer = self._tokenizer(expert)
            with self._encoding:
                ids = list(tokenizer(prompt)["input_ids"])
            if not ids and tokenizer.bos_token_id is not None:
                ids = [int(tokenizer.bos_token_id)]
        else:
            ids = list(prompt)
        if not ids:
            raise RequestError("the prompt is empty and the tokenizer has no beginning-of-sequence token")
        known = self._worker.layers.vocabulary if expert is None else expert.vocabulary
        wrong = next((i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < known), None)
        if wrong is not None:
            raise RequestError(f"expected token ids from 0 to {known - 1}, found {wrong!r}")
        return ids

    def _encode_chat(self, messages: Any, expert: Expert | None) -> list[int]:
        if not messages or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
            raise RequestError(
                'expected messages such as {"role": "user", "content": "..."}, found ' + repr(messages)[:80]
            )
        tokenizer = self._tokenizer(expert)
        if not getattr(tokenizer, "chat_template", None):
            name = "the base" if expert is None else f"expert {expert.name!r}"
            raise RequestError(f"{name} has no chat template", hint="use generate with a prompt of your own")
        with self._encoding:
            try:
                encoded = tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )
            except Exception as error:  # a template raises what it likes
                raise RequestError(f"the chat template refuses these messages: {error}") from error
        return list(encoded["input_ids"])

    def _draw(
        self,
        ids: list[int],
        expert: Expert | None,
        generation: GenerationConfig,
        sampling: dict[str, Any],
        seed: int | None,
        eos: set[int],
        *,
        chat: bool,
    ) -> Draw:
        settings = copy.deepcopy(generation)
        given = {key: sampling[key] for key in SHAPING if sampling[key] is not None}
        temperature = given.pop("temperature", None)
        asks = any(key in given for key in ("top_k", "top_p", "min_p"))
        default = bool(generation.do_sample) if chat else False
        settings.do_sample = temperature > 0 if temperature is not None else asks or default
        if temperature:
            settings.temperature = temperature
        for key, value in given.items():
            setattr(settings, key, value)
        settings.guidance_scale = None  # needs a second prompt
        settings._eos_token_tensor = torch.tensor(sorted(eos)) if eos else None
        processors = self._worker.model._get_logits_processor(settings, input_ids_seq_length=len(ids), device="cpu")
        generator = None
        if settings.do_sample:
            generator = torch.Generator().manual_seed(random.SystemRandom().getrandbits(63) if seed is None else seed)
        outputs = self._worker.layers.outputs if expert is None else expert.outputs
        return Draw(processors, outputs, generator)


def _open_router(router: Any, base: Path) -> Any:
    if not isinstance(router, str | os.PathLike):
        return router
    from meswitch.router.routers import load_router

    return load_router(Path(router), base)


def _load_tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def _load_generation(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").exists():
        return None
    return GenerationConfig.from_pretrained(folder, local_files_only=True)
