"""The bytes that an engine says its experts take, looked at again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from meswitch.engine.engine import Engine


class BudgetWatch:
    """A context manager: while it lasts, a thread asks an engine for its bytes; then `faults` says what was wrong.

    They may be more than the budget only where that was lowered, and then only become fewer. `changes` counts when the
    budget begins to change and when it has.
    """

    def __init__(self, engine: Engine, most: int, changes: Callable[[], int], every: float = 0.05) -> None:
        self._engine, self._most, self._changes, self._every = engine, most, changes, every
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.samples = self.largest = 0
        self.faults: list[str] = []

    def __enter__(self) -> BudgetWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        since, before = -1, 0
        while not self._ended.wait(self._every):
            changes = self._changes()
            host = self._engine.stats()["host"]
            used = host["bytes"]
            settled = changes == self._changes() == since
            if used > self._most or (settled and used > max(host["budget"], before)):
                self.faults.append(f"{used} bytes, after {before}, under a budget of {host['budget']}")
            since, before = changes, used
            self.samples, self.largest = self.samples + 1, max(self.largest, used)

    def summary(self) -> dict[str, object]:
        return {"budget": self._most, "largest": self.largest, "samples": self.samples}
