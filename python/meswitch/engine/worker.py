"""The thread that owns the model: it loads the base, admits requests, runs every step and every job between steps.

    callers ── submit, post, call ──> inbox ──> one turn: jobs, admission, a step

Ownership: the model, the experts' pool and layers, the batch, `waiting` and `live` are this thread's. Other threads put
functions into the inbox; beside that they read counters, and what is fixed once `ready` has a result. A caller acquires
its request's expert; it is released here, when the request ends.
"""

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
from transformers import LogitsProcessorList

from meswitch.batching import attention
from meswitch.batching.bridge import PagedBatch
from meswitch.batching.cache import CachePlan, cache_geometry, plan_cache
from meswitch.batching.compatibility import check_supported, check_transformers
from meswitch.batching.sampler import RequestSampler, SamplingState
from meswitch.batching.scheduler import ExpertScheduler, RequestSlot
from meswitch.batching.step import NewToken
from meswitch.engine.request import Request
from meswitch.errors import BudgetError, MeswitchError, RequestError, UnsupportedModelError
from meswitch.experts.pool import ExpertPool
from meswitch.experts.settings import SettingsReader
from meswitch.huggingface.config import context_limit
from meswitch.huggingface.models import load_model
from meswitch.kernels.rows import BASE_SLOT
from meswitch.kernels.select import select_kernels
from meswitch.layers.install import ExpertLayers

_log = logging.getLogger(__name__)
T = TypeVar("T")
_DEFAULT_KV_BYTES = 2**30


@dataclass
class Settings:
    """What an engine was made with, checked. Budgets are bytes."""

    base: Path
    dtype: Any
    exact: bool
    kernels: str
    device: torch.device
    host_budget: int | None
    kv_budget: int | None
    max_batch_tokens: int


class Worker(threading.Thread):
    """The thread that owns the model. Other threads reach it through `submit`, `post` and `call`.

    `ready` gets a result once the model is loaded, or what went wrong. `waiting`: requests that are not admitted yet;
    `live`: by id, those in the batch. The counters `steps`, `step_tokens`, `finished` and `failed` may be read from any
    thread.
    """

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
        """Queues `job`, to run between steps; false when the engine is closed."""
        if not self.open:
            return False
        with self._lock:
            if self._closed:
                return False
            self.inbox.put(job)
            return True

    def call(self, function: Callable[[], T]) -> T:
        """Runs `function` between steps and returns what it returns, or raises what it raises."""
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

    def call_plain(self, function: Callable[[], T]) -> T:
        """`call` with the attention that the base has outside of continuous batching."""

        def switched() -> T:
            with attention.switched_attention(self.model, self._plain_attention):
                return function()

        return self.call(switched)

    def counters(self) -> dict[str, Any]:
        """Counts of requests and steps since the start, and the size of the KV cache."""
        return {
            "requests": {
                "waiting": len(self.waiting),
                "running": len(self.live),
                "finished": self.finished,
                "failed": self.failed,
            },
            "steps": self.steps,
            "step_tokens": self.step_tokens,
            "kv": {"bytes": self.plan.nbytes, "tokens": self.kv_tokens},
        }

    def submit(self, requests: list[Request]) -> None:
        """Hands over requests, and with them what they hold of their experts. Raises where the engine is closed."""
        if not self.post(lambda: self.waiting.extend(requests)):
            raise closed()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread after the running step, and waits for it."""
        if self.open:
            with self._lock:
                self._closed = True
                self.inbox.put(lambda: None)
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout)

    # on the thread: start and end

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
        check_transformers(settings.device)
        model = load_model(settings.base, settings.dtype or "auto", check=check_supported).to(settings.device)
        self.model: Any = model.eval().requires_grad_(False)
        self.text_config = model.config.get_text_config(decoder=True)
        kernels = select_kernels(settings.kernels, settings.device, exact=settings.exact)
        self.layers = ExpertLayers(model, kernels)
        self._start_batching()
        self.settings_reader = SettingsReader(settings.base, self.text_config)
        self.pool = ExpertPool(
            self.layers,
            settings.base,
            self.settings_reader,
            budget=settings.host_budget,
            closed=self.scheduler.forget,
        )
        self._try_step()

    def _start_batching(self) -> None:
        paged = attention.can_be_paged(self.model)
        self.plan = plan = self._plan_cache(masks=not paged)
        self.sampler = RequestSampler()
        self._plain_attention = attention.plain_attention(self.model)
        try:
            self.batch: Any = PagedBatch(
                self.model,
                page_size=plan.page_size,
                blocks=plan.blocks,
                max_batch_tokens=plan.max_batch_tokens,
                scheduler=ExpertScheduler,
                sampler=self.sampler,
                attention=attention.PAGED if paged else None,
                plan_attention=attention.plan_attention if paged else None,
            )
        except MemoryError as error:
            raise BudgetError(f"kv_budget: {plan.nbytes} bytes do not fit this machine: {error}") from error
        plan.check(self.batch.nbytes)
        self.scheduler: Any = self.batch.scheduler
        self.kv_tokens: int = self.batch.kv_tokens

    def _plan_cache(self, *, masks: bool) -> CachePlan:
        steps = self.settings.max_batch_tokens
        geometry = cache_geometry(self.text_config, self.model.dtype, masks=masks)
        budget = self.settings.kv_budget
        if budget is None:
            tokens = max(4 * context_limit(self.text_config)[0], 8192)
            budget = min(geometry.need(tokens, steps), max(_DEFAULT_KV_BYTES, geometry.need(512, steps)))
        return plan_cache(self.text_config, self.model.dtype, budget, max_batch_tokens=steps, masks=masks)

    def _try_step(self) -> None:
        """One token through the base, so that a model that asks for more than a step gives is refused at start."""
        name = "start"
        self.scheduler.slots[name] = RequestSlot()
        self.sampler.states[name] = SamplingState(LogitsProcessorList(), self.layers.outputs)
        self.batch.add(name, [0], 1, ())
        self.batch.prepare()
        try:
            self.batch.run()
        except MeswitchError:
            raise
        except Exception as error:  # whatever a model does with a cache that is not its own
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot run under continuous batching: its first step failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.batch.update()
        del self.scheduler.slots[name], self.sampler.states[name]

    def _end(self, error: BaseException) -> None:
        """Fails every request that is still open, runs what the inbox holds, and releases the model."""
        with self._lock:
            self._closed = self._ended = True
        for request in [*self.live.values(), *self.waiting]:
            request.fail(error)
        self.live, self.waiting = {}, []
        while not self.inbox.empty():
            with contextlib.suppress(Exception):  # a job reports to its own caller
                self.inbox.get_nowait()()
        for request in self.waiting:  # submitted by one of those jobs
            request.fail(error)
        self.waiting = []
        self.pool.close()
        self.batch.close()
        self.batch = self.model = self.scheduler = None

    # on the thread: one turn

    def _turn(self) -> None:
        """Jobs first, then who can be admitted, then one step."""
        self._run_jobs(wait=not self.live and not self.waiting)
        self._admit()
        if self.live and not self._step() and not self.waiting:
            self._run_jobs(wait=True, timeout=0.01)  # nothing could be scheduled: do not spin

    def _run_jobs(self, *, wait: bool, timeout: float | None = None) -> None:
        """Runs what the inbox holds; `wait`: until there is something, at most `timeout` seconds."""
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
        """Admits in order of arrival; behind one whose expert has no room yet, only the base's requests go on."""
        waiting, self.waiting = self.waiting, []
        blocked = False
        for request in waiting:
            try:
                if request.cancelled:
                    self._release_expert(request)
                    request.fail(_cancelled())
                elif request.expert is not None and (blocked or not self.pool.residency.admit(request.expert)):
                    blocked = True
                    self.waiting.append(request)
                else:
                    self._add(request)
            except Exception as error:
                if request.id in self.live:
                    self._remove(request, cancel=True)
                else:
                    self._release_expert(request)
                self._fail(request, error)

    def _step(self) -> bool:
        """One forward pass; false where nothing was scheduled. If it fails, only its requests fail."""
        try:
            if not self.batch.prepare():
                return False
            self._activate_experts()
            self.batch.run()
            tokens = self.batch.update()
        except Exception as error:
            self._fail_step(error)
            return True
        finally:
            self.layers.step.end()
        self.steps += 1
        for new in tokens:
            self._accept(new)
        return True

    def _activate_experts(self) -> None:
        """Tells the layers which expert each row of the step belongs to."""
        kept = self.scheduler.kept_slots()
        tokens = self.scheduler.token_slots()
        self.step_tokens += len(tokens)
        if any(slot != BASE_SLOT for slot in tokens):
            self.layers.step.begin(tokens, kept)

    def _accept(self, new: NewToken) -> None:
        """Turns a token into text; ends the request where it is its last, or completes a stop string."""
        request = self.live.get(new.request_id)
        if request is None:
            return
        try:
            request.accept(new.token)
        except Exception as error:  # a tokenizer that cannot decode
            self._remove(request, cancel=True)
            self._fail(request, error)
            return
        if new.finished or request.decoder.stopped:
            self._remove(request, cancel=not new.finished)
            self.finished += 1
            request.finish("stop" if request.tokens[-1] in request.eos else "length")

    def _fail_step(self, error: Exception) -> None:
        """Fails the requests of a step that raised, or all where it is not known whose step it was."""
        ids = [entry.state.request_id for entry in self.scheduler.step] or list(self.live)
        own = error if isinstance(error, MeswitchError) else None
        for request_id in ids:
            request = self.live.get(request_id)
            if request is not None:
                self._remove(request, cancel=True)
                failure = own or MeswitchError(f"a step failed: {type(error).__name__}: {error}")
                if own is None:
                    failure.__cause__ = error
                self._fail(request, failure)

    # on the thread: one request

    def _add(self, request: Request) -> None:
        """Puts an admitted request into the batch."""
        expert = request.expert
        slot = RequestSlot() if expert is None else RequestSlot(expert.slot or 0, expert.salt)
        self.live[request.id] = request
        self.scheduler.slots[request.id] = slot
        self.sampler.states[request.id] = request.sampling
        self.batch.add(request.id, request.ids, request.limit, request.eos)

    def _remove(self, request: Request, *, cancel: bool) -> None:
        """Takes a request out of the batch and releases its expert; `cancel` where the batch has not finished it."""
        if cancel:
            self.batch.cancel(request.id)
        for by_id in (self.live, self.scheduler.slots, self.sampler.states):
            by_id.pop(request.id, None)
        if request.expert is not None:
            self.pool.residency.unpin(request.expert)
        self._release_expert(request)

    def _release_expert(self, request: Request) -> None:
        if request.expert is not None:
            self.pool.release(request.expert)

    def _fail(self, request: Request, error: BaseException) -> None:
        self.failed += 1
        request.fail(error)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Ends requests that nobody wants any more. Those that still wait end when they would be admitted."""
        for request in requests:
            request.cancelled = True
            if request.id in self.live:
                self._remove(request, cancel=True)
                request.fail(_cancelled())


def _cancelled() -> RequestError:
    return RequestError("the request was cancelled")


def closed() -> MeswitchError:
    return MeswitchError("the engine is closed", hint="make a new Engine; a forked process needs one of its own")
