"""The thread that owns the model: it loads the base, admits requests, runs every step and every job between steps.

    callers ── submit ──────> registry, queue ─┐
            ── post, call ──> inbox ───────────┴─> one turn: jobs, deadlines, admission, a step

Ownership: the model, the experts' layers and residency, the batch, `queue` and `live` are this thread's. Other threads
put jobs into the inbox and requests into the registry; beside that they read counters, and what is fixed once `ready`
has a result. A caller acquires its request's expert; it is released here, when the request ends.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
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
from meswitch.engine.admission import AdmissionQueue
from meswitch.engine.inbox import Inbox
from meswitch.engine.registry import Registry
from meswitch.engine.request import Request
from meswitch.errors import BudgetError, EngineClosedError, MeswitchError, UnsupportedModelError
from meswitch.experts.pool import ExpertPool
from meswitch.experts.settings import SettingsReader
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.config import context_limit
from meswitch.huggingface.models import load_model, own_weights
from meswitch.kernels.invariance import BatchInvariance
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
    max_waiting: int | None


class Worker(threading.Thread):
    """The thread that owns the model. Other threads reach it through `submit`, `inbox.post` and `call`.

    `ready` gets a result once the model is loaded, or what went wrong. `registry`: every request that has not ended;
    `queue`: those that are not admitted yet; `live`: by id, those in the batch. `steps` and `step_tokens` may be read
    from any thread.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="meswitch-engine", daemon=True)
        self.settings = settings
        self.ready: Future[None] = Future()
        self.inbox = Inbox()
        self.registry = Registry(settings.max_waiting)
        self.queue = AdmissionQueue()
        self.live: dict[str, Request] = {}
        self.steps = self.step_tokens = 0

    # from any thread

    def call(self, function: Callable[[], T], *, calls_model: bool = True) -> T:
        """`Inbox.call`, also from this thread itself."""
        if threading.current_thread() is self:
            return function()
        return self.inbox.call(function, calls_model=calls_model)

    def call_plain(self, function: Callable[[], T]) -> T:
        """`call` with the attention that the base has outside of continuous batching."""

        def switched() -> T:
            with attention.switched_attention(self.model, self._plain_attention):
                return function()

        return self.call(switched)

    def counters(self) -> dict[str, Any]:
        """Counts of requests and steps since the start, and the size of the KV cache. Waits for nobody."""
        counts = self.registry.counts
        return {
            "requests": {
                "waiting": counts.waiting,
                "running": counts.running,
                "finished": counts.finished,
                "failed": counts.failed,
                "cancelled": counts.cancelled,
            },
            "steps": self.steps,
            "step_tokens": self.step_tokens,
            "kv": {"bytes": self.plan.nbytes, "tokens": self.kv_tokens},
        }

    def submit(self, requests: list[Request]) -> None:
        """Hands over requests, and with them what they hold of their experts.

        Raises `EngineClosedError`, or `OverloadedError` where too many would wait; then none is taken.
        """
        with self.inbox.lock:
            self.inbox.check_accepting()
            self.registry.accept(requests)
            self.inbox.post(lambda: self._enqueue(requests))

    def stop(self) -> None:
        """Ends the thread after the running step, and waits for it; requests that are left fail."""
        self._join(self.inbox.close, None)

    def drain(self, timeout: float | None) -> None:
        """Accepts nothing more and waits until every request has ended, at most `timeout` seconds."""
        self._join(self.inbox.drain, timeout)

    def _join(self, tell: Callable[[], None], timeout: float | None) -> None:
        if self.is_alive():  # which it is not in a forked process
            tell()
            if threading.current_thread() is not self:
                self.join(timeout)

    # on the thread: start and end

    def run(self) -> None:
        try:
            self._load()
        except BaseException as error:
            self.inbox.close()
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        reason: BaseException = EngineClosedError()
        try:
            while not self.inbox.closed and not (self.inbox.draining and not self.registry):
                self._turn()
        except BaseException as fatal:
            reason = _typed("the engine's thread ended", fatal)
        finally:
            self._end(reason)

    def _load(self) -> None:
        settings = self.settings
        check_transformers(settings.device)
        base = Checkpoint(settings.base)
        model = load_model(base, settings.dtype or "auto", check=check_supported).to(settings.device)
        own_weights(model)
        base.sample()  # what experts are compared with, taken now: the file may be cut while it is served
        self.model: Any = model.eval().requires_grad_(False)
        if settings.exact and model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # products of rows with one matrix, which can be kept apart
        self.text_config = model.config.get_text_config(decoder=True)
        kernels = select_kernels(settings.kernels, settings.device, exact=settings.exact)
        self.layers: Any = ExpertLayers(model, kernels, run=self.call)
        self._start_batching()
        self.settings_reader = SettingsReader(settings.base, self.text_config)
        self.pool = ExpertPool(
            self.layers,
            base,
            self.settings_reader,
            budget=settings.host_budget,
            closed=self.scheduler.forget,
        )
        self._try_step()

    def _start_batching(self) -> None:
        exact, paged = self.settings.exact, attention.can_be_paged(self.model)
        self._arithmetic = BatchInvariance if exact else contextlib.nullcontext
        plan_attention = attention.plan_invariant_attention if exact else attention.plan_attention
        self.plan = plan = self._plan_cache(masks=not paged)
        self.sampler: Any = RequestSampler()
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
                plan_attention=plan_attention if paged else None,
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
            with self._arithmetic():
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

    def _end(self, reason: BaseException) -> None:
        """Fails every request that is still open, whatever ended the thread, and releases the model."""
        self.inbox.close()
        self.registry.fail_all(reason)
        self.inbox.run_rest()
        for close in (self.pool.close, self.batch.close):
            try:
                close()
            except Exception:
                _log.exception("the engine could not be closed in order")
        self.live, self.queue = {}, AdmissionQueue()
        self.batch = self.model = self.scheduler = self.layers = self.sampler = None

    # on the thread: one turn

    def _turn(self) -> None:
        """Jobs first, then who is late, then who can be admitted, then one step."""
        self.inbox.run(wait=not self.live and not self.queue)
        for request, error in self.registry.expired(time.monotonic()):
            self._fail(request, error)
        self._admit()
        if self.live and not self._step():
            self.inbox.run(wait=True, timeout=0.01)  # nothing could be scheduled: do not spin

    def _enqueue(self, requests: list[Request]) -> None:
        self.queue.add(request for request in requests if request in self.registry)  # it may be late already

    def _admit(self) -> None:
        """Fills the batch up to what one step takes, in the order of `queue`."""
        self.queue.retry()
        while len(self.live) < self.scheduler.max_requests and (request := self.queue.take()) is not None:
            try:
                if request.expert is None or self.pool.residency.admit(request.expert):
                    self._add(request)
                else:
                    self.queue.block(request)
            except Exception as error:
                self._fail(request, _typed("the request could not be admitted", error))

    def _step(self) -> bool:
        """One forward pass; false where nothing was scheduled. If it fails, only its requests fail."""
        try:
            if not self.batch.prepare():
                return False
            self._begin_step()
            with self._arithmetic():
                self.batch.run()
            tokens = self.batch.update()
            failures = self.sampler.failures()
        except Exception as error:
            self._fail_step(_typed("a step failed", error))
            return True
        finally:
            self.layers.step.end()
        self.steps += 1
        for new in tokens:
            request = self.live.get(new.request_id)
            if request is not None and new.request_id in failures:
                self._fail(request, failures[new.request_id], finished=new.finished)
            elif request is not None:
                self._accept(request, new)
        return True

    def _begin_step(self) -> None:
        """Counts who runs in the step, and tells the layers which expert each of its rows belongs to."""
        for entry in self.scheduler.step:
            self.registry.start(self.live[entry.state.request_id])
        kept = self.scheduler.kept_slots()
        tokens = self.scheduler.token_slots()
        self.step_tokens += len(tokens)
        if any(slot != BASE_SLOT for slot in tokens):
            self.layers.step.begin(tokens, kept)

    def _accept(self, request: Request, new: NewToken) -> None:
        """Turns a token into text; ends the request where it is its last, or completes a stop string."""
        answer = None
        try:
            request.accept(new.token)
            if new.finished or request.decoder.stopped:
                answer = request.complete()
        except Exception as error:  # a tokenizer that cannot decode
            self._fail(request, _typed("the tokens could not be decoded", error), finished=new.finished)
            return
        if answer is not None:
            self._release(request, finished=new.finished)
            self.registry.finish(request, answer)

    def _fail_step(self, error: MeswitchError) -> None:
        """Fails the requests of a step that raised, or all where it is not known whose step it was."""
        for request_id in [entry.state.request_id for entry in self.scheduler.step] or list(self.live):
            request = self.live.get(request_id)
            if request is not None:
                self._fail(request, error)

    # on the thread: one request

    def _add(self, request: Request) -> None:
        """Puts an admitted request into the batch."""
        expert = request.expert
        slot = RequestSlot() if expert is None else RequestSlot(expert.slot or 0, expert.salt)
        self.live[request.id] = request
        self.scheduler.slots[request.id] = slot
        self.sampler.states[request.id] = request.sampling
        self.batch.add(request.id, request.ids, request.limit, request.eos)

    def _release(self, request: Request, *, finished: bool = False) -> None:
        """Takes a request out of the queue or the batch, and gives its expert back; `finished` where it has left the
        batch by itself."""
        self.queue.discard(request)
        expert = request.expert
        if self.live.pop(request.id, None) is not None:
            if not finished:
                self.batch.cancel(request.id)
            self.scheduler.slots.pop(request.id, None)
            self.sampler.states.pop(request.id, None)
            if expert is not None:
                self.pool.residency.unpin(expert)
        if expert is not None:
            self.pool.release(expert)

    def _fail(self, request: Request, error: MeswitchError, *, finished: bool = False) -> None:
        self._release(request, finished=finished)
        self.registry.fail(request, error)

    def cancel(self, requests: Iterable[Request]) -> None:
        """Ends requests that nobody wants any more."""
        for request in requests:
            if request in self.registry:
                self._release(request)
                self.registry.cancel(request)


def _typed(what: str, error: BaseException) -> MeswitchError:
    """`error` as one that its requests raise; where it is none of ours, its frames are in the log only."""
    if isinstance(error, MeswitchError):
        return error
    _log.info("%s", what, exc_info=error)
    failure = MeswitchError(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
