"""The experts of one engine: names to opened deltas, who uses them, and which are resident under a byte budget.

catalogue   name -> Expert    what a new request gets; replaced and removed experts leave it at once
Expert      uses              requests that have acquired it, waiting or running; a retired one is closed at 0
            pins              requests that run on it: never evicted
            slot              its adapter slot in the layers while resident, else `None`
"""

from __future__ import annotations

import difflib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from meswitch.delta.directory import Delta
from meswitch.errors import ArchitectureError, BudgetError, ExpertNotFoundError, FormatError, MeswitchError
from meswitch.experts.catalogue import Expert, check_folder, check_name
from meswitch.huggingface.config import config_changes, text_config
from meswitch.layers.install import ExpertLayers


class ExpertPool:
    """The experts of one engine.

    `base`: what `Delta.check_base` compares with; `config`: the base's text config, `None` where experts have none.
    `open_delta` is `Delta.open` unless a test says otherwise. Everything that touches the layers (`add`, `remove`,
    `admit`, `release`) runs on the engine's thread; `get`, `acquire`, `describe` and `counters` may be called from any.
    """

    def __init__(
        self,
        layers: ExpertLayers,
        base: Path | None,
        config: Any = None,
        *,
        budget: int | None = None,
        open_delta: Callable[[Path], Any] | None = None,
    ) -> None:
        self.layers, self.base, self.config, self.budget = layers, base, config, budget
        self.open_delta = open_delta or (lambda path: Delta.open(path))
        self.catalogue: dict[str, Expert] = {}
        self.resident: OrderedDict[int, Expert] = OrderedDict()  # by salt, least recently used first
        self.hits = self.misses = self.evictions = 0
        self._salts = itertools.count(1)
        self._lock = threading.RLock()

    # The catalogue.

    def discover(self, experts: str | Path | Iterable[str | Path] | Mapping[str, str | Path] | None) -> None:
        """Opens a folder of experts, a list of folders, or `{name: folder}`.

        In a folder a broken expert is kept with its error; one that was named raises it.
        """
        if experts is None:
            return
        if isinstance(experts, str | Path):
            self._discover_folder(Path(experts))
        elif isinstance(experts, Mapping):
            for name, path in experts.items():
                self.add(name, Path(path))
        else:
            for path in experts:
                self.add(Path(path).absolute().name, Path(path))

    def _discover_folder(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or not (path.is_dir() or path.is_symlink()):
                continue
            try:
                self.add(check_name(path.name), check_folder(path))
            except (MeswitchError, OSError, ValueError) as error:
                self.catalogue[path.name] = Expert(path.name, path, error=error)

    def add(self, name: str, path: Path) -> Expert:
        """Opens and checks the delta in `path`, and gives it to every later request for `name`.

        Requests that have acquired the expert of that name before finish on it. Raises what is wrong with the delta.
        """
        expert = self.open(check_name(name), path)
        with self._lock:
            old = self.catalogue.get(name)
            self.catalogue[name] = expert
        if old is not None:
            self._retire(old)
        return expert

    def open(self, name: str, path: Path) -> Expert:
        """An expert that can be served, not yet in the catalogue. Raises what is wrong with it."""
        delta = self.open_delta(path)
        try:
            if self.base is not None:
                delta.check_base(self.base)
            expert = Expert(name, path, delta, salt=next(self._salts))
            expert.config = self._checked_config(name, path)
            tied = self.layers.tied if expert.config is None else bool(expert.config.tie_word_embeddings)
            expert.tied = tied
            self.layers.check(expert.sites, tied=tied)
            expert.vocabulary, expert.outputs = self.layers.vocabulary_of(expert.sites, tied=tied)
            if self.budget is not None and expert.nbytes > self.budget:
                raise BudgetError(
                    f"expert {name!r} needs {expert.nbytes} bytes, host_budget is {self.budget} bytes",
                    hint="raise host_budget, or compress with fewer bits",
                )
        except BaseException:
            delta.close()
            raise
        return expert

    def _checked_config(self, name: str, path: Path) -> Any:
        if self.config is None:
            return None
        try:
            config = text_config(path)
        except (OSError, ValueError) as error:
            raise FormatError(
                f"{path}: expected the fine-tune's config.json, found none that reads: {error}"
            ) from error
        changes = config_changes(self.config.to_dict(), config.to_dict())
        if changes:
            found = ", ".join(f"{field}: base {ours!r}, expert {theirs!r}" for field, (ours, theirs) in changes.items())
            raise ArchitectureError(
                f"expert {name!r} computes differently from the base; {found}",
                hint="one base serves only fine-tunes that keep its settings: `meswitch restore` it, serve it alone",
            )
        return config

    def get(self, name: str) -> Expert:
        """The expert that a new request for `name` runs on. Raises `ExpertNotFoundError`, or the expert's own
        error."""
        with self._lock:
            expert = self.catalogue.get(name)
            if expert is None:
                raise self._not_found(name)
            if expert.error is not None:
                raise expert.error.with_traceback(None)
            return expert

    def acquire(self, name: str) -> Expert:
        """`get`, and the expert stays open until it is released."""
        with self._lock:
            expert = self.get(name)
            expert.uses += 1
            return expert

    def _not_found(self, name: str) -> ExpertNotFoundError:
        known = sorted(self.catalogue)
        close = difflib.get_close_matches(str(name), known, n=3)
        if close:
            hint = f"did you mean {' or '.join(map(repr, close))}?"
        else:
            hint = f"there are {', '.join(map(repr, known[:8]))}" if known else "the engine has no experts"
        return ExpertNotFoundError(f"unknown expert: {name!r}", hint=hint)

    def remove(self, name: str) -> None:
        """Removes `name`; requests that have acquired its expert finish first. Raises `ExpertNotFoundError`."""
        with self._lock:
            if name not in self.catalogue:
                raise self._not_found(name)
            expert = self.catalogue.pop(name)
        self._retire(expert)

    # Residency.

    @property
    def resident_bytes(self) -> int:
        return sum(expert.nbytes for expert in self.resident.values())

    def admit(self, expert: Expert) -> bool:
        """Pins `expert` and makes it resident, evicting unpinned ones first. False if pinned ones fill the budget."""
        if expert.slot is not None:
            self.hits += 1
            self.resident.move_to_end(expert.salt)
        elif not self._make_room(expert.nbytes):
            return False
        else:
            self.misses += 1
            self._install(expert)
        expert.pins += 1
        expert.served += 1
        return True

    def _install(self, expert: Expert) -> None:
        slot = next(s for s in itertools.count() if all(e.slot != s for e in self.resident.values()))
        try:
            self.layers.install(slot, expert.sites, tied=expert.tied)
        except BaseException:
            self.layers.remove(slot)
            raise
        expert.slot = slot
        self.resident[expert.salt] = expert

    def _make_room(self, nbytes: int) -> bool:
        if self.budget is None:
            return True
        idle = [expert for expert in self.resident.values() if not expert.pins]
        if self.resident_bytes - sum(expert.nbytes for expert in idle) + nbytes > self.budget:
            return False
        for expert in idle:
            if self.resident_bytes + nbytes <= self.budget:
                break
            self._evict(expert)
            self.evictions += 1
        return True

    def _evict(self, expert: Expert) -> None:
        assert expert.slot is not None
        self.layers.remove(expert.slot)
        del self.resident[expert.salt]
        expert.slot = None

    def unpin(self, expert: Expert) -> None:
        expert.pins -= 1

    def release(self, expert: Expert) -> None:
        """Ends one use of an expert; a removed one that nobody uses is closed. On the engine's thread."""
        with self._lock:
            expert.uses -= 1
        self._close_if_done(expert)

    def _retire(self, expert: Expert) -> None:
        expert.retired = True
        self._close_if_done(expert)

    def _close_if_done(self, expert: Expert) -> None:
        with self._lock:
            if not expert.retired or expert.uses or expert.delta is None:
                return
            delta, expert.delta = expert.delta, None
        if expert.slot is not None:
            self._evict(expert)
        delta.close()

    def close(self) -> None:
        with self._lock:
            experts = list(self.catalogue.values())
            self.catalogue.clear()
        for expert in experts:
            expert.uses = 0
            self._retire(expert)

    # Counters.

    def describe(self) -> dict[str, dict[str, Any]]:
        """By name: `path`, `residency` ("disk" or "host"), `bytes`, `bpw`, `uses`, `served`, `error`."""
        with self._lock:
            return {
                name: {
                    "path": str(expert.path),
                    "residency": "disk" if expert.slot is None else "host",
                    "bytes": expert.nbytes,
                    "bpw": None if expert.delta is None else float(expert.delta.bpw),
                    "uses": expert.uses,
                    "served": expert.served,
                    "error": None if expert.error is None else f"{type(expert.error).__name__}: {expert.error}",
                }
                for name, expert in sorted(self.catalogue.items())
            }

    def counters(self) -> dict[str, int | None]:
        return {
            "budget": self.budget,
            "bytes": self.resident_bytes,
            "hits": self.hits,
            "misses": self.misses,
            "evictions": self.evictions,
        }
