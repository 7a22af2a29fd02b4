"""Engine: the façade over preparation, the worker and the pool of experts."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from meswitch.engine.loading import Settings
from meswitch.engine.model import ServedModel
from meswitch.engine.offloaded import Offloading
from meswitch.engine.preparation import Preparation
from meswitch.engine.prompt import Conversation, Prompt, conversations_of, one_prompt, prompts_of
from meswitch.engine.request import Answer, Request
from meswitch.engine.routing import Routing, ServedBase, open_router
from meswitch.engine.sampling import check_whole_number
from meswitch.engine.stream import TextStream
from meswitch.engine.worker import Worker
from meswitch.errors import RequestError
from meswitch.experts.catalogue import is_folder_of_experts
from meswitch.huggingface.checkpoint import resolve
from meswitch.kernels.select import usable_device, usable_dtype
from meswitch.router.protocol import Router
from meswitch.sizes import parse_bytes


class Engine:
    """Serves a base and its experts from one thread.

    Budgets are bytes, or text such as `"8GiB"`.

    What is served:

    * `base`: a folder or hub id, or a model that `quantize` made, whose matrices stay packed. `dtype`: torch's name of
      one, without: the checkpoint's own.
    * `experts`: a folder of delta directories (one sub-folder an expert; a broken one is listed with its error and
      takes no other down), a delta directory or a list of them, or `{name: directory}`. With `watch` a folder of them
      is looked at every second: what appears there is served, and what is replaced or removed there is here too, while
      requests in flight finish on what they began with.
    * `router`: a folder or an object with `route`, for `expert="auto"`.
    * `allow_quantized_base`: whether deltas may be put on a quantized form of the base that they were made against;
      refused without.

    Where and how it runs:

    * `device`: torch's name of one. `kernels`: `"auto"`, `"cpu"` or `"cuda"` (native), or `"torch"` (any device, slow).
    * `exact` asks for the reference's arithmetic, the same for a request whatever else is in the batch; several times
      slower.
    * `max_batch_tokens`: the tokens of one step; longer prompts are split. `max_waiting`: how many requests may wait
      for a place in the batch before further ones are refused (no bound without). `max_experts`: the most experts whose
      requests run at a time (no bound without).

    Memory:

    * `host_budget` over the deltas in host memory (no bound without), and `device_budget` over those on a device (no
      bound of its own without: what leaves host memory leaves the device). `eviction`: which idle expert leaves first
      when another needs its room, `"lru"` or `"lrfu"`. `trace`: a file to write to what is asked for, loaded and
      evicted, for `meswitch replay`.
    * `kv_budget` over the KV cache with its masks and indices (without: what four full contexts need, 1 GiB at most).

    A mixture of experts whose MoE experts need not fit in memory (CPU only); deltas may change everything else:

    * `moe_budget`: memory for MoE experts. They stay in the checkpoint's files, which must not be written to, and are
      read when a gate chooses them.
    * `moe_mode`: with `"exact"`, answers are those of the whole model bit for bit at any budget. With `"fallback"`,
      low-bit copies of all MoE experts are in memory too, beside the budget, and answer for what is not, except for the
      `moe_fetched` choices of a token that weigh most; they are those of `moe_copies`, a model that `quantize` made of
      this one. With `"virtual"` (SwapMoE, arXiv 2308.15030) gates choose among those that are in memory, and which
      these are follows what is asked, by reads in the background of at most `moe_swap_rate` bytes a second (64 MiB; 0:
      they stay as they are); with `moe_copies` they are that model's, packed. `moe_profile`, a file of `meswitch moe
      profile`, says which come first, and how many each layer has.
    * `moe_trace`: in the first two modes, a file like that of `trace` about the matrices of MoE experts, for `meswitch
      moe timeline` and `meswitch replay`.

    A context manager. May be used from any thread; a forked process needs an engine of its own. Raises
    `UnsupportedModelError`, `BudgetError`, `RequestError`, `BackendError`, `CudaUnavailableError`, and what is wrong
    with an expert that was named; `OSError` where a trace cannot be written.

    >>> with Engine("base/", experts="experts/") as engine:
    ...     answer = engine.generate("What is 17 * 23?", expert="math", max_new_tokens=4)
    ...     pieces = list(engine.stream("What is 17 * 23?", expert="base", max_new_tokens=4))
    >>> answer.expert, answer.finish_reason, len(answer.token_ids)
    ('math', 'length', 4)
    """

    def __init__(
        self,
        base: str | Path,
        experts: str | Path | Iterable[str | Path] | Mapping[str, str | Path] | None = None,
        router: Router | str | Path | None = None,
        device: str = "cpu",
        dtype: str | torch.dtype | None = None,
        exact: bool = False,
        host_budget: int | str | None = None,
        device_budget: int | str | None = None,
        kv_budget: int | str | None = None,
        *,
        kernels: str = "auto",
        max_batch_tokens: int = 512,
        max_waiting: int | None = None,
        max_experts: int | None = None,
        eviction: str = "lru",
        trace: str | Path | None = None,
        watch: bool = False,
        allow_quantized_base: bool = False,
        moe_budget: int | str | None = None,
        moe_mode: str = "exact",
        moe_copies: str | Path | None = None,
        moe_fetched: int = 1,
        moe_profile: str | Path | None = None,
        moe_swap_rate: int | str | None = None,
        moe_trace: str | Path | None = None,
    ) -> None:
        if device_budget is not None and usable_device(device).type == "cpu":
            raise RequestError(
                f"device_budget: expected none with device='cpu', found {device_budget!r}",
                hint="host_budget bounds the resident deltas",
            )
        if watch and not is_folder_of_experts(experts):
            raise RequestError(f"watch: expected a folder of delta directories as experts, found {experts!r}")
        if trace is not None and moe_trace is not None and Path(trace).absolute() == Path(moe_trace).absolute():
            raise RequestError(f"moe_trace: expected another file than that of trace, found {str(trace)!r}")
        settings = Settings(
            base=Path(resolve(base)),
            dtype=usable_dtype(dtype),
            exact=exact,
            kernels=kernels,
            device=usable_device(device),
            host_budget=parse_bytes(host_budget, "host_budget"),
            device_budget=parse_bytes(device_budget, "device_budget"),
            kv_budget=parse_bytes(kv_budget, "kv_budget"),
            max_batch_tokens=check_whole_number("max_batch_tokens", max_batch_tokens, least=1),
            max_waiting=None if max_waiting is None else check_whole_number("max_waiting", max_waiting, least=1),
            max_experts=None if max_experts is None else check_whole_number("max_experts", max_experts, least=1),
            eviction=eviction,
            allow_quantized_base=allow_quantized_base,
            offloading=Offloading.of(
                moe_budget,
                moe_mode,
                moe_copies,
                moe_fetched,
                moe_profile,
                moe_swap_rate,
                moe_trace,
                cpu=usable_device(device).type == "cpu",
                exact=exact,
            ),
        )
        router = open_router(router, settings.base)
        self._worker = worker = Worker(settings)
        self._finalizer = weakref.finalize(self, worker.stop)
        worker.start()
        try:
            worker.ready.result()
            base_settings = worker.settings_reader.base
            routing = Routing(router, ServedBase(worker, base_settings))
            self._preparation = Preparation(ServedModel.of(worker), base_settings, worker, routing)
            if trace is not None:
                worker.pool.residency.start_trace(Path(trace))
            worker.pool.discover(experts)
            if watch:
                worker.watch(Path(experts))  # type: ignore[arg-type]
        except BaseException:
            self.close()
            raise

    # Experts.

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """By name: `path`, `residency` ("disk" or "host"), `bytes`, `bpw`, `uses`, `pinned`, the `error` of one that
        cannot be served, and since the start: `requests` that were answered, their `tokens`, `hits` and `misses` (was
        it in memory when a request came), `loads`, `evictions`; and of the latest, as `p50` and `p99`: `load_ms`,
        `queue_ms` (from the call until it is in the batch), `first_token_ms`, `tokens_per_second`."""
        return self._worker.pool.describe()

    def add_expert(self, name: str, path: str | Path) -> None:
        """Adds or replaces an expert; requests in flight finish on the one they began with.

        It is opened and checked on the calling thread, and loaded when it is asked for. Raises what is wrong with it,
        or `EngineClosedError`.
        """
        with self._unless_closed():
            self._worker.pool.add(name, Path(path))

    def remove_expert(self, name: str) -> None:
        """Removes an expert; requests in flight finish on it. Raises `ExpertNotFoundError`, `EngineClosedError`."""
        with self._unless_closed():
            self._worker.pool.remove(name)

    def prefetch(self, name: str) -> None:
        """Loads an expert in the background, if there is room for it beside those in use or waited for.

        Raises `ExpertNotFoundError`, what is wrong with the expert, or `EngineClosedError`.
        """
        with self._unless_closed():
            self._worker.pool.prefetch(name)

    def pin(self, name: str) -> None:
        """Loads an expert as soon as there is room for it, and never evicts it from then on.

        What replaces it is pinned too. Raises `BudgetError` where the pinned experts exceed `host_budget`, and what
        `prefetch` raises.
        """
        with self._unless_closed():
            self._worker.pool.pin(name)

    def unpin(self, name: str) -> None:
        """Lets an expert be evicted again. Raises `ExpertNotFoundError`, `EngineClosedError`."""
        with self._unless_closed():
            self._worker.pool.unpin(name)

    def set_host_budget(self, budget: int | str | None) -> None:
        """Changes `host_budget`. Under a smaller one idle experts leave now, and those in use when their requests end;
        until then nothing is loaded. Waiting requests for an expert that is larger fail with a `BudgetError`."""
        with self._unless_closed():
            self._worker.pool.residency.set_budget(parse_bytes(budget, "host_budget"))

    def stats(self) -> dict[str, Any]:
        """A snapshot, which waits for nobody: sizes in bytes, and counts since the start.

        `requests`: `running` are in the batch, `waiting` are not yet; every other that was accepted is `finished`,
        `failed` or `cancelled`. `steps`, `step_tokens`, `kv` (`bytes`, and `tokens` that one request can have). `host`:
        `budget`, `bytes` (spoken for by experts that are loading, in memory or not given back yet), `pinned_bytes` (in
        use), `hits`, `misses`, `loads`, `failed_loads`, `stopped_loads`, `evictions`, `loaded_bytes`. `device`: the
        same of `device_budget`, `None` without; then requests that a device did not have are those that `host` counts.
        `moe`: `None` without `moe_budget`; else `budget`, `bytes` (of MoE experts in memory or being read),
        `allocated_bytes` (free slots included, never above the budget), `hits` and `misses` (each matrix of a MoE
        expert that a layer needs in a step counts once), the same for each of `layers`, `loads`, `failed_loads`,
        `evictions`, `loaded_bytes`; in mode `"fallback"` also `choices` of MoE experts by tokens, and `copied`, those
        that a copy answered; in mode `"virtual"`, where nothing is missed or evicted, `choices`, `redirected` (those
        that gates would have made of MoE experts that were not in memory), `swaps` and `swapped_bytes`. `answered`:
        what each of `experts` says of its requests, over all and the base.
        """
        worker = self._worker
        return {
            **worker.counters(),
            "host": worker.pool.residency.counters(),
            "device": worker.pool.residency.device_counters(),
            "answered": worker.counts.describe(),
            "experts": self.experts,
        }

    def close(self, *, drain: bool = False, timeout: float | None = None) -> None:
        """Ends the engine and frees its memory. Calls that are made from now on raise `EngineClosedError`.

        Requests in flight fail with it after the running step; with `drain` they are answered first, and only what is
        left after `timeout` seconds fails.
        """
        if drain:
            self._worker.drain(timeout)
        self._finalizer()

    @contextmanager
    def _unless_closed(self) -> Iterator[None]:
        """Whatever goes wrong inside because the engine is being closed is an `EngineClosedError`."""
        self._worker.inbox.check_accepting()
        try:
            yield
        except Exception:
            self._worker.inbox.check_accepting()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Requests.

    def generate(
        self, prompt: Prompt | Sequence[Prompt], expert: str | Sequence[str] | None = None, **sampling: Any
    ) -> Any:
        """Answers one prompt (an `Answer`) or a list of them (a list, in order), all in one batch.

        A prompt is text, or token ids in a list, tuple, array or tensor, or what a tokenizer returned. `expert`: a
        name, `"base"`, `"auto"` (the router chooses), or one of these for each prompt; without it `"auto"` where the
        engine has a router, else `"base"`.

        Sampling, alike for `stream` and `chat`: `max_new_tokens`, `temperature`, `top_k`, `top_p`, `min_p`,
        `repetition_penalty`, `stop` (a string or several, special tokens too), `seed` (one for all prompts or one
        each). What is not given comes from the expert's generation_config.json, else its config.json; where neither
        says, there are at most 256 new tokens, and a draw is among the 50 likeliest tokens as in transformers
        (`top_k=0`: among all). `generate` and `stream` are greedy unless `temperature` is above 0 or `top_k`, `top_p`
        or `min_p` is given; `chat` samples where that file says `do_sample`. `temperature=0` is greedy. What that file
        asks for and the engine has not (beams, guidance, `max_time`, …) is logged as a warning when the expert is
        opened. `timeout` (none): seconds from the call on, looked at between steps, after which a request that has not
        ended fails. `priority`: `"interactive"`, or `"batch"` for what can wait: it enters the batch after all that is
        interactive, but after 30 seconds as if it were.

        The same seed gives the same draws whoever else is in the batch, and in an engine with `exact=True` the same
        text. In others the last bits of logits depend on how many tokens a step has: in bfloat16 a near tie may fall
        otherwise (12 of 36 greedy texts and 2 of 36 sampled ones did; in float32 none).

        Raises `ExpertNotFoundError`, `RequestError`, `RouterError`, `RequestTimeoutError`, `OverloadedError` where more
        than `max_waiting` requests would wait (then none of them runs), `EngineClosedError`, and what a failed step
        raised.
        """
        prompts, single = prompts_of(prompt)
        answers = self._answers(self._prepare(prompts, expert, sampling))
        return answers[0] if single else answers

    def stream(self, prompt: Prompt, expert: str | None = None, **sampling: Any) -> TextStream:
        """The answer to one prompt as pieces of text; arguments as in `generate`."""
        return self._stream(self._prepare([one_prompt(prompt)], expert, sampling)[0])

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        expert: str | Sequence[str] | None = None,
        *,
        stream: bool = False,
        **sampling: Any,
    ) -> Any:
        """Answers a conversation (`[{"role": ..., "content": ...}, ...]`) under the expert's own chat template.

        A list of conversations is one batch, `expert` as in `generate`. An `Answer`, a list of them for a list, or a
        `TextStream` with `stream=True` (one conversation only).
        """
        batch, single = conversations_of(messages)
        if stream and not single:
            raise RequestError(f"stream: expected one conversation, found {len(batch)}")
        requests = self._prepare(batch, expert, sampling, chat=True)
        if stream:
            return self._stream(requests[0])
        answers = self._answers(requests)
        return answers[0] if single else answers

    def _prepare(
        self, prompts: list[Any], expert: str | Sequence[str] | None, sampling: dict[str, Any], *, chat: bool = False
    ) -> list[Request]:
        """Requests, submitted to the worker."""
        with self._unless_closed():
            self._worker.registry.check_room(len(prompts))  # before any work on them
            requests = self._preparation.requests(prompts, expert, sampling, chat=chat)
            try:
                self._worker.submit(requests)
            except BaseException:
                self._preparation.release(requests)
                raise
        return requests

    def _answers(self, requests: list[Request]) -> list[Answer]:
        try:
            return [request.result() for request in requests]
        finally:
            self._cancel([request for request in requests if not request.ended])

    def _stream(self, request: Request) -> TextStream:
        return TextStream(request, lambda request: self._cancel([request]))

    def _cancel(self, requests: list[Request]) -> None:
        if requests:
            self._worker.inbox.post(lambda: self._worker.cancel(requests))
