"""A thread that changes an engine's experts, their files and its budget while requests run."""

from __future__ import annotations

import heapq
import itertools
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from serving.traffic import ABSENT, DAMAGED, Truth

from meswitch.engine.engine import Engine
from meswitch.errors import BudgetError

Undo = tuple[float, int, Callable[[], None]]


class Churn(threading.Thread):
    """Adds, replaces, removes, damages, repairs, pins and prefetches, one at a time, and has every change undone soon.

    `numbers`: the expert behind each name at first, whose files are `folder(number)`; `others(number)`: those that may
    replace it. `truth` is told of all. Every name has a directory of its own in `root`, which is removed or written to
    while it is served. `budgets`: between which the host budget changes; `changes` counts when it begins to and when
    it has. What it does goes to `counts`; what should not be, to `faults`.
    """

    def __init__(
        self,
        root: Path,
        truth: Truth,
        numbers: dict[str, int],
        folder: Callable[[int], Path],
        others: Callable[[int], list[int]],
        budgets: tuple[int, int],
        *,
        every: float = 0.05,
        pins: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(name="churn", daemon=True)
        self.truth = truth
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._budget_changes = 0
        self._root, self._folder, self._others = root, folder, others
        self._budgets, self._every, self._pins = budgets, every, pins
        self._draw = random.Random(seed)
        self._generations = itertools.count()
        self._numbers, self._calm = dict(numbers), set(numbers)  # `_calm`: nothing is to be undone
        self.paths = {name: self._new_directory(number) for name, number in numbers.items()}
        self._undo: list[Undo] = []
        self._stopped = threading.Event()
        for name, number in numbers.items():
            self.truth.begins(name, number)

    def changes(self) -> int:
        return self._budget_changes

    def begin(self, engine: Engine) -> None:
        """Starts with an engine that has the experts `paths`."""
        self._engine = engine
        self.start()

    def finish(self) -> None:
        """Undoes all and ends."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        actions = [self._replace, self._remove, self._damage, self._pin, self._prefetch, self._shrink]
        try:
            while not self._stopped.wait(self._every):
                self._undo_until(time.monotonic())
                action = self._draw.choices(actions, (4, 2, 3, 1, 4, 0.3))[0]
                if self._calm:
                    action(self._draw.choice(sorted(self._calm)))
                    self.counts[action.__name__.lstrip("_")] += 1
            self._undo_until(float("inf"))
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")

    def _undo_until(self, now: float) -> None:
        while self._undo and self._undo[0][0] <= now:
            heapq.heappop(self._undo)[2]()

    def _later(self, undo: Callable[[], None], most: float = 0.5) -> None:
        heapq.heappush(self._undo, (time.monotonic() + self._draw.uniform(0, most), next(self._generations), undo))

    def _new_directory(self, number: int) -> Path:
        path = self._root / f"{next(self._generations)}"
        shutil.copytree(self._folder(number), path)
        return path

    # The changes.

    def _replace(self, name: str) -> None:
        old, new = self._numbers[name], self._draw.choice(self._others(self._numbers[name]))
        self._put(name, new, instead_of=old)

    def _put(self, name: str, number: int, *, instead_of: int) -> None:
        before, self.paths[name] = self.paths[name], self._new_directory(number)
        self.truth.begins(name, number)
        self._engine.add_expert(name, self.paths[name])
        self.truth.ended(name, instead_of)
        self._numbers[name] = number
        shutil.rmtree(before)  # which does no harm to who is served from it

    def _remove(self, name: str) -> None:
        number = self._numbers[name]
        self._calm.discard(name)
        self.truth.begins(name, ABSENT)
        self._engine.remove_expert(name)
        self.truth.ended(name, number)

        def undo() -> None:
            self._put(name, number, instead_of=ABSENT)
            self._calm.add(name)

        self._later(undo)

    def _damage(self, name: str) -> None:
        file = self.paths[name] / self._draw.choice(("meswitch.json", *["delta.safetensors"] * 4))
        sound = file.read_bytes()
        self._calm.discard(name)
        self.truth.begins(name, DAMAGED)
        with file.open("r+b") as opened:  # in place, as no tool of ours does
            if self._draw.random() < 0.5:
                opened.truncate(self._draw.randrange(len(sound)))
            else:
                at = self._draw.randrange(len(sound))
                opened.seek(at)
                opened.write(bytes([sound[at] ^ 1 << self._draw.randrange(8)]))

        def undo() -> None:
            with file.open("r+b") as opened:
                opened.write(sound)
            self.truth.ended(name, DAMAGED)
            self._calm.add(name)

        self._later(undo)

    def _pin(self, name: str) -> None:
        if sum(expert["pinned"] for expert in self._engine.experts.values()) >= self._pins:
            return
        try:
            self._engine.pin(name)
        except BudgetError:  # the budget is the smaller one just now
            return
        self._calm.discard(name)
        self._later(lambda: self._unpin(name, self._is_resident(name)), 1.0)

    def _unpin(self, name: str, was_resident: bool) -> None:
        """Later, so that it is seen whether what was in memory has stayed there."""

        def undo() -> None:
            if was_resident and not self._is_resident(name):
                self.faults.append(f"{name} left although it was pinned")
            self._engine.unpin(name)
            self._calm.add(name)

        self._later(undo)

    def _is_resident(self, name: str) -> bool:
        return bool(self._engine.experts[name]["residency"] == "host")

    def _prefetch(self, name: str) -> None:
        self._engine.prefetch(name)

    def _shrink(self, name: str) -> None:
        least, most = self._budgets
        self._set_budget(least)
        self._later(lambda: self._set_budget(most))

    def _set_budget(self, budget: int) -> None:
        self._budget_changes += 1
        self._engine.set_host_budget(budget)
        self._budget_changes += 1
