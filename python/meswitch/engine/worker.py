"""The thread that owns the model: it loads the base, admits requests, runs every step and every job between steps."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

from meswitch.batching import attention
from meswitch.batching.bridge import _Silent, check_supported
from meswitch.batching.cache import CachePlan, cache_geometry, plan_cache
from meswitch.batching.sampler import RequestSampler
from meswitch.batching.scheduler import BASE, Seat
from meswitch.batching.scheduler import NAME as SCHEDULER
from meswitch.engine.request import Request
from meswitch.errors import BudgetError, MeswitchError, RequestError
from meswitch.experts.pool import ExpertPool
from meswitch.huggingface.config import context_limit
from meswitch.huggingface.models import load_model
from meswitch.kernels.select import select_kernels
from meswitch.layers.install import ExpertLayers

_log = logging.getLogger(__name__)
T = TypeVar("T")
_DEFAULT_KV_BYTES = 2**30


def generation_config(**settings: Any) -> GenerationConfig:
    return GenerationConfig(**settings)


@dataclass
class Settings:
    base: Path
    dtype: Any
    exact: bool
    kernels: str
    device: torch.device
    host_budget: int | None
    kv_budget: int | None
    max_batch_tokens: int


class Worker(threading.Thread):
    """The thread that owns the model. Other threads reach it through `submit`, `post` and `call`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="meswitch-engine", daemon=True)
        self.settings = settings
        self.ready: Future[None] = Future()
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.waiting: list[Request] = []
        self.live: dict[str, Request] = {}
        self.steps = self.step_tokens = self.finished = self.failed = 0
        self._closed = self._ended = False
        self._process = os.getpid()
        self._lock = threading.RLock()  # a finalizer may run inside `post`

    # from any thread

    @property
    def open(self) -> bool:
        # Asked without the lock: a fork leaves the thread behind, and whoever held the lock.
        return not self._closed and self._process == os.getpid()

    def post(self, job: Callable[[], None]) -> bool:
        """Queues `job`; false when the engine is closed."""
        if not self.open:
            return False
        with self._lock:
            if self._closed:
                return False
            self.inbox.put(job)
            return True

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function` between steps and returns what it returns."""
        if threading.current_thread() is self:
            return function()
        future: Future[T] = Future()

        def job() -> None:
            try:
                if self._ended:
                    raise closed()
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        if not self.post(job):
            raise closed()
        return future.result()

    def submit(self, requests: list[Request]) -> None:
        if not self.post(lambda: self.waiting.extend(requests)):
            raise closed()

    def stop(self, timeout: float | None = None) -> None:
        if self.open:
            with self._lock:
                self._closed = True
                self.inbox.put(lambda: None)
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout)

    # on the thread

    def run(self) -> None:
        try:
            self._load()
        except BaseException as error:
            self._closed = True
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        reason = closed()
        try:
            while not self._closed:
                self._turn()
        except BaseException as fatal:
            reason = MeswitchError(f"the engine's thread ended: {type(fatal).__name__}: {fatal}")
            reason.__cause__ = fatal
        finally:
            self._end(reason)

    def _load(self) -> None:
        settings = self.settings
        model = load_model(settings.base, settings.dtype or "auto", check=check_supported).to(settings.device)
        self.model = model.eval().requires_grad_(False)
        self.text_config = model.config.get_text_config(decoder=True)
        kernels = select_kernels(settings.kernels, settings.device, exact=settings.exact)
        self.layers = ExpertLayers(model, kernels)
        self.pool = ExpertPool(self.layers, settings.base, self.text_config, budget=settings.host_budget)
        self._start_batching()

    def _start_batching(self) -> None:
        """transformers' manager resolves settings and builds the processor; its thread is never started."""
        plan = self._plan_cache()
        manager: ContinuousBatchingManager = self.model.init_continuous_batching(
            generation_config=generation_config(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                scheduler_type=SCHEDULER,
                page_size=plan.page_size,
                num_blocks=plan.blocks,
                max_batch_tokens=plan.max_batch_tokens,
                max_requests_per_batch=min(256, plan.max_batch_tokens),
                max_memory_percent=1.0,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
                seed=0,
            ),
        )
        self.sampler = RequestSampler()
        processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([self.sampler]))
        processors.tensors_required = 1  # it counts only those it converted itself
        manager.logit_processor = processors
        manager.output_router = _Silent()  # type: ignore[assignment]
        capped = getattr(self.text_config, "attn_logit_softcapping", None) is not None
        sdpa = self.model.config._attn_implementation == "sdpa"
        self.plain_attention = "sdpa" if sdpa and not capped else "eager"
        paged = sdpa or capped
        if paged:  # before the processor, so that it sets up no masks
            self.model.set_attn_implementation(attention.PAGED)
        state = torch.get_rng_state()  # building a processor seeds the global generator
        try:
            self.processor: Any = manager._create_batch_processor()
        except MemoryError as error:
            raise BudgetError(f"kv_budget: {plan.nbytes} bytes do not fit this machine: {error}") from error
        torch.set_rng_state(state)
        self.scheduler: Any = self.processor.scheduler
        if paged:
            attention.hand_reads(self.processor.inputs_and_outputs)
        self.kv_tokens = infer_max_single_request_tokens(self.processor.cache)
        self.plan = plan

    def _plan_cache(self) -> CachePlan:
        steps = self.settings.max_batch_tokens
        geometry = cache_geometry(self.text_config, self.model.dtype)
        budget = self.settings.kv_budget
        if budget is None:
            tokens = max(4 * context_limit(self.text_config)[0], 8192)
            budget = min(geometry.need(tokens, steps), max(_DEFAULT_KV_BYTES, geometry.need(512, steps)))
        return plan_cache(self.text_config, self.model.dtype, budget, max_batch_tokens=steps)

    def plainly(self, function: Callable[[], T]) -> T:
        """Runs `function` on the base as it is outside continuous batching, between steps."""

        def switched() -> T:
            paged = self.model.config._attn_implementation
            self.model.set_attn_implementation(self.plain_attention)
            try:
                return function()
            finally:
                self.model.set_attn_implementation(paged)

        return self.call(switched)

    def _turn(self) -> None:
        """Jobs first, then who can be admitted, then one step."""
        self._jobs(wait=not self.live and not self.waiting)
        self._admit()
        if self.live and not self._step() and not self.waiting:
            self._jobs(wait=True, timeout=0.01)  # nothing could be scheduled: do not spin

    def _jobs(self, *, wait: bool, timeout: float | None = None) -> None:
        while True:
            try:
                job = self.inbox.get(block=wait, timeout=timeout)
            except queue.Empty:
                return
            try:
                job()
            except Exception:  # `call` reports to its caller; nothing else may end the thread
                _log.exception("a job between steps failed")
            wait = False

    def _admit(self) -> None:
        """In order of arrival; behind one whose expert has no room yet, only the base's requests go on."""
        waiting, self.waiting = self.waiting, []
        blocked = False
        for request in waiting:
            try:
                if request.cancelled:
                    self._drop(request)
                elif request.expert is not None and (blocked or not self.pool.admit(request.expert)):
                    blocked = True
                    self.waiting.append(request)
                else:
                    self._start(request)
            except Exception as error:
                if request.id in self.live:
                    self._leave(request, cancel=True)
                else:
                    self._let_go(request)
                self._fail(request, error)

    def _start(self, request: Request) -> None:
        expert = request.expert
        seat = Seat() if expert is None else Seat(expert.slot or 0, expert.salt)
        self.live[request.id] = request
        self.scheduler.seats[request.id] = seat
        self.sampler.draws[request.id] = request.draw
        state = RequestState(
            request_id=request.id,
            initial_tokens=list(request.ids),
            max_new_tokens=request.limit,
            eos_token_id=sorted(request.eos),
        )
        self.scheduler.add_waiting_request(state)

    def _step(self) -> bool:
        """One forward pass; false where nothing was scheduled. Its failure is its requests' alone."""
        self.scheduler.step = []
        try:
            if not self.processor.prepare_next_batch():
                return False
            self._place_rows()
            self.processor._generation_step(self.model)
            self.processor.update_batch()
        except Exception as error:
            self._fail_step(error)
            return True
        finally:
            self.layers.step.end()
        self.steps += 1
        for entry in self.scheduler.step:
            if entry.has_new_token:
                self._token(entry.state)
        return True

    def _place_rows(self) -> None:
        kept = self.scheduler.kept_slots()
        tokens = self.scheduler.token_slots()
        self.step_tokens += len(tokens)
        if any(slot != BASE for slot in tokens):
            self.layers.step.begin(tokens, kept)

    def _token(self, state: RequestState) -> None:
        request = self.live.get(state.request_id)
        if request is None:
            return
        try:
            request.accept(state.generated_tokens[-1])
        except Exception as error:  # a tokenizer that cannot decode
            self._leave(request, cancel=True)
            self._fail(request, error)
            return
        if state.status == RequestStatus.FINISHED or request.decoder.stopped:
            self._leave(request, cancel=state.status != RequestStatus.FINISHED)
            self.finished += 1
            request.finish("stop" if request.tokens[-1] in request.eos else "length")

    def _fail_step(self, error: Exception) -> None:
        ids = [entry.state.request_id for entry in self.scheduler.step] or list(self.live)
        cause = error if isinstance(error, MeswitchError) else None
        for request_id in ids:
            request = self.live.get(request_id)
            if request is not None:
                self._leave(request, cancel=True)
                failure = cause or MeswitchError(f"a step failed: {type(error).__name__}: {error}")
                if cause is None:
                    failure.__cause__ = error
                self._fail(request, failure)

    def _leave(self, request: Request, *, cancel: bool) -> None:
        """Takes a request out of the scheduler and gives its expert back."""
        if cancel:
            self.scheduler.set_request_cancellation(request.id)
            self.scheduler.clear_cancelled_requests()
        for by_id in (self.live, self.scheduler.seats, self.sampler.draws):
            by_id.pop(request.id, None)
        if request.expert is not None:
            self.pool.unpin(request.expert)
        self._let_go(request)

    def _let_go(self, request: Request) -> None:
        if request.expert is not None:
            self.pool.release(request.expert)

    def _fail(self, request: Request, error: BaseException) -> None:
        self.failed += 1
        request.fail(error)

    def cancel(self, requests: Iterable[Request]) -> None:
        for request in requests:
            request.cancelled = True
            if request.id in self.live:
                self._leave(request, cancel=True)
                self._drop(request, held=False)

    def _drop(self, request: Request, *, held: bool = True) -> None:
        if held:
            self._let_go(request)
        request.fail(RequestError("the request was cancelled"))

    def _end(self, error: BaseException) -> None:
        """Nobody waits for an answer that will not come."""
        with self._lock:
            self._closed = self._ended = True
        for request in [*self.live.values(), *self.waiting]:
            request.fail(error)
        self.live, self.waiting = {}, []
        while not self.inbox.empty():
            with contextlib.suppress(Exception):  # a job reports to its own caller
                self.inbox.get_nowait()()
        for request in self.waiting:
            request.fail(error)
        self.waiting = []
        self.pool.close()
        self.processor = self.model = self.scheduler = None


def closed() -> MeswitchError:
    return MeswitchError("the engine is closed", hint="make a new Engine; a forked process needs one of its own")
