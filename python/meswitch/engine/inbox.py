"""What other threads hand to the engine's thread, to run between two steps."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from meswitch.errors import EngineClosedError

_log = logging.getLogger(__name__)
T = TypeVar("T")
Job = Callable[[], None]


class Inbox:
    """Jobs for the thread that calls `run`.

    `post` is for what is done in no time. `call` is for what runs the model: one such job runs between two steps, so
    that whoever has many of them does not hold up the running requests.

    Open; then `draining`, when nothing new is accepted but jobs still run; then `closed`, when none runs any more. The
    thread waits for no lock but `lock`, which callers hold for a moment only.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # a finalizer may run inside it
        self.draining = self.closed = False
        self._jobs: queue.SimpleQueue[tuple[Job, bool]] = queue.SimpleQueue()
        self._deferred: deque[Job] = deque()
        self._process = os.getpid()

    # from any thread

    @property
    def accepting(self) -> bool:
        # Asked without the lock: a fork leaves the thread behind, and whoever held the lock.
        return not self.draining and not self.closed and self._process == os.getpid()

    def check_accepting(self) -> None:
        """Raises `EngineClosedError` where nothing new is accepted."""
        if not self.accepting:
            raise EngineClosedError()

    def post(self, job: Job) -> bool:
        """Queues `job`; false where it will not run."""
        return self._put(job, calls_model=False)

    def call(self, function: Callable[[], T], *, calls_model: bool = True) -> T:
        """Runs `function` between steps and returns what it returns, or raises what it raises."""
        self.check_accepting()
        future: Future[T] = Future()

        def job() -> None:
            try:
                if self.closed:
                    raise EngineClosedError()
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        if not self._put(job, calls_model=calls_model):
            raise EngineClosedError()
        return future.result()

    def _put(self, job: Job, *, calls_model: bool) -> bool:
        if self._process != os.getpid():
            return False
        with self.lock:
            if not self.closed:
                self._jobs.put((job, calls_model))
            return not self.closed

    def drain(self) -> None:
        """From now on nothing new is accepted."""
        with self.lock:
            self.draining = True
            self._jobs.put((lambda: None, False))  # wakes the thread

    def close(self) -> None:
        """From now on jobs do not run."""
        with self.lock:
            self.draining = self.closed = True
            self._jobs.put((lambda: None, False))

    # on the thread

    def run(self, *, wait: bool, timeout: float | None = None) -> None:
        """Runs what was posted, and one job that calls the model; `wait`: until there is something, at most `timeout`
        seconds."""
        wait = wait and not self._deferred
        for _ in range(max(1, self._jobs.qsize())):
            try:
                job, calls_model = self._jobs.get(block=wait, timeout=timeout)
            except queue.Empty:
                break
            wait = False
            if calls_model:
                self._deferred.append(job)
            else:
                _run(job)
        if self._deferred:
            _run(self._deferred.popleft())

    def run_rest(self) -> None:
        """Runs what is left after `close`, so that whoever waits hears of it."""
        while self._deferred or not self._jobs.empty():
            self.run(wait=False)


def _run(job: Job) -> None:
    try:
        job()
    except Exception:  # `call` reports to its caller; nothing else may end the thread
        _log.exception("a job between steps failed")
