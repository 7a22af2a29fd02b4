"""The thread that owns the model: it loads the base, admits requests, runs every step and every job between steps.

    callers ── submit ──────> registry, queue ─┐
            ── post, call ──> inbox ───────────┴─> one turn: jobs, deadlines, admission, a step

Ownership: the model, the experts' layers and residency, the batch, `queue` and `live` are this thread's. Other threads
put jobs into the inbox and requests into the registry; beside that they read counters, and what is fixed once `ready`
has a result. A caller acquires its request's expert; it is released here, when the request ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from meswitch.batching import attention
from meswitch.batching.prefill import PrefillChunk
from meswitch.batching.scheduler import RequestSlot
from meswitch.batching.step import NewToken
from meswitch.engine.admission import AdmissionQueue
from meswitch.engine.inbox import Inbox
from meswitch.engine.loading import Settings, load_base
from meswitch.engine.registry import Registry
from meswitch.engine.request import Request
from meswitch.errors import EngineClosedError, MeswitchError
from meswitch.experts.catalogue import Expert
from meswitch.experts.counts import ExpertCounts
from meswitch.experts.pool import ExpertPool
from meswitch.experts.watch import FolderWatch
from meswitch.kernels.rows import BASE_SLOT

_log = logging.getLogger(__name__)
T = TypeVar("T")
_INSTALL_SECONDS = 0.005  # a turn: how long others wait for experts that are put into the layers
_LOOK_SECONDS = 0.05  # how often requests that wait are looked at where nothing runs


class Worker(threading.Thread):
    """The thread that owns the model. Other threads reach it through `submit`, `inbox.post` and `call`.

    `ready` gets a result once the model is loaded, or what went wrong. `registry`: every request that has not ended;
    `queue`: those that are not admitted yet; `live`: by id, those in the batch; `running`: their experts. `steps`,
    `step_tokens` and `counts`, over all experts and the base, may be read from any thread.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="meswitch-engine", daemon=True)
        self.settings = settings
        self.ready: Future[None] = Future()
        self.inbox = Inbox()
        self.registry = Registry(settings.max_waiting)
        self.live: dict[str, Request] = {}
        self.running: set[Expert] = set()
        self.counts = ExpertCounts()
        self._idle = False
        self._watch: FolderWatch | None = None
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
            "moe": None if self.moe is None else self.moe.counters(),
        }

    def submit(self, requests: list[Request]) -> None:
        """Hands over requests, and with them what they hold of their experts.

        Raises `EngineClosedError`, or `OverloadedError` where too many would wait; then none is taken.
        """
        with self.inbox.lock:
            self.inbox.check_accepting()
            self.registry.accept(requests)
            self.inbox.post(lambda: self._enqueue(requests))

    def watch(self, folder: Path) -> None:
        """Follows what happens to a folder of experts, until the end."""
        self._watch = FolderWatch(self.pool, folder)
        self._watch.start()

    def stop(self) -> None:
        """Ends the thread after the running step, and waits for it; requests that are left fail."""
        self._join(self.inbox.close, None)

    def drain(self, timeout: float | None) -> None:
        """Accepts nothing more and waits until every request has ended, at most `timeout` seconds."""
        self._join(self.inbox.drain, timeout)

    def _join(self, tell: Callable[[], None], timeout: float | None) -> None:
        if self.is_alive():  # which it is not in a forked process
            if self._watch is not None:
                self._watch.close()
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
        loaded = load_base(settings, self.call)
        self.model: Any = loaded.model
        self.layers: Any = loaded.layers
        self.batch: Any = loaded.batch
        self.scheduler: Any = loaded.batch.scheduler
        self.sampler: Any = loaded.sampler
        self.plan, self.kv_tokens = loaded.plan, loaded.batch.kv_tokens
        self.text_config, self.settings_reader = loaded.text_config, loaded.settings_reader
        self._arithmetic, self._plain_attention = loaded.arithmetic, loaded.plain_attention
        self.moe = loaded.moe
        self.chunk = PrefillChunk(settings.max_batch_tokens)
        self.pool = ExpertPool(
            self.layers,
            loaded.base,
            self.settings_reader,
            budget=settings.host_budget,
            device_budget=settings.device_budget,
            policy=settings.eviction,
            allow_quantized_base=settings.allow_quantized_base,
            closed=lambda salt: self.inbox.post(lambda: self.scheduler.forget(salt)),
            notify=lambda: self.inbox.post(lambda: None),
        )
        self.queue = AdmissionQueue(self.pool.residency, settings.max_experts)

    def _end(self, reason: BaseException) -> None:
        """Fails every request that is still open, whatever ended the thread, and releases the model."""
        self.inbox.close()
        self.registry.fail_all(reason)
        self.inbox.run_rest()
        for close in (self.pool.close, self.batch.close, *(() if self.moe is None else (self.moe.close,))):
            try:
                close()
            except Exception:
                _log.exception("the engine could not be closed in order")
        self.live, self.running = {}, set()
        self.batch = self.model = self.scheduler = self.layers = self.sampler = None

    # on the thread: one turn

    def _turn(self) -> None:
        """Jobs first, then who is late, then who can be admitted, then one step."""
        # Without a step to run, until a job comes; loads end with one. While some wait, their time must be looked at.
        self.inbox.run(wait=self._idle, timeout=_LOOK_SECONDS if self.queue else None)
        for request, error in self.registry.expired(time.monotonic()):
            self._fail(request, error)
        self._update_residency()
        self._admit()
        self._idle = not self.live and not self.pool.residency.is_installing
        if self.live and not self._step():
            self.inbox.run(wait=True, timeout=0.01)  # nothing could be scheduled: do not spin

    def _enqueue(self, requests: list[Request]) -> None:
        accepted = [request for request in requests if request in self.registry]  # it may be late already
        for request in accepted:
            if request.expert is not None:
                self.pool.residency.ask(request.expert)
        self.queue.add(accepted)
        for request in accepted:
            expert = request.expert
            if expert is not None and expert.failure is not None:  # it went wrong since it was acquired
                self._fail(request, _load_error(expert, expert.failure.error))

    def _update_residency(self) -> None:
        """Puts experts that were loaded into the layers, takes out those that were evicted, and fails requests whose
        expert cannot be loaded."""
        changed, failed = self.pool.residency.update(_INSTALL_SECONDS)
        for expert in changed:
            self.queue.refresh(expert)
        for expert, error in failed:
            self.pool.fail(expert, error)
            for request in self.queue.of(expert):
                self._fail(request, _load_error(expert, error))

    def _admit(self) -> None:
        """Fills the batch up to what one step takes, in the order of `queue`."""
        while len(self.live) < self.scheduler.max_requests:
            request = self.queue.next(self.running)
            if request is None:
                return
            expert = request.expert
            if expert is not None and not self.pool.residency.pin(expert):
                self._update_residency()  # it was evicted since
                continue
            self.queue.discard(request)
            try:
                self._add(request)
            except Exception as error:
                self._fail(request, _typed("the request could not be admitted", error))

    def _step(self) -> bool:
        """One forward pass; false where nothing was scheduled. If it fails, only its requests fail."""
        try:
            if not self.batch.prepare():
                return False
            self._begin_step()
            start = time.monotonic()
            with self._arithmetic():
                self.batch.run()
            decoding, prompt_tokens = self.scheduler.count_tokens()
            self.chunk.learn(decoding, prompt_tokens, time.monotonic() - start)
            self.scheduler.prompt_tokens = self.chunk.tokens
            tokens = self.batch.update()
            failures = self.sampler.failures()
        except Exception as error:
            self._fail_step(_typed("a step failed", error))
            return True
        finally:
            self.layers.step.end()
            if self.moe is not None:
                self.moe.end_step()
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
        if self.moe is not None:
            self.moe.begin_step(len(tokens))

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
            self._count(request)
            self._release(request, finished=new.finished)
            self.registry.finish(request, answer)

    def _count(self, request: Request) -> None:
        """Counts a request that was answered."""
        now = time.monotonic()
        for counts in (self.counts, *(() if request.expert is None else (request.expert.counts,))):
            counts.count(
                tokens=len(request.tokens),
                waited=request.admitted - request.arrived,
                first=(request.first_token or now) - request.arrived,
                rest=now - (request.first_token or now),
            )

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
        self.live[request.id] = request
        request.admitted = time.monotonic()
        slot = RequestSlot()
        if expert is not None:
            assert expert.slot is not None
            slot = RequestSlot(expert.slot, expert.salt)
            self.running.add(expert)
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
                if not expert.leases:
                    self.running.discard(expert)
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


def _load_error(expert: Expert, error: BaseException) -> MeswitchError:
    return _typed(f"expert {expert.name!r} could not be loaded", error)


def _typed(what: str, error: BaseException) -> MeswitchError:
    """`error` as one that its requests raise; where it is none of ours, its frames are in the log only."""
    if isinstance(error, MeswitchError):
        return error
    _log.info("%s", what, exc_info=error)
    failure = MeswitchError(f"{what}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
