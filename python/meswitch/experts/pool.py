"""The experts of one engine: names to opened deltas, and who uses them.

catalogue   name -> Expert    what a new request gets; replaced and removed experts leave it at once
Expert      uses              requests that have acquired it, waiting or running; a retired one is closed at 0
            failure           why it takes no requests; it comes back when its files are sound again
            leases, slot      see `residency`
"""

from __future__ import annotations

import difflib
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from meswitch.delta.directory import Delta
from meswitch.errors import (
    BudgetError,
    ExpertNameError,
    ExpertNotFoundError,
    FormatError,
    MeswitchError,
    fresh,
)
from meswitch.expert_name import check_name
from meswitch.experts.catalogue import Expert, check_folder, expert_folders, is_folder_of_experts
from meswitch.experts.device import DeviceResidency
from meswitch.experts.failure import Failure, stamp
from meswitch.experts.residency import Residency
from meswitch.experts.settings import SettingsReader
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.layers.install import ExpertLayers


class ExpertPool:
    """The experts of one engine. Its methods may be called from any thread; the locks that they take are held for a few
    look-ups at most. `residency` says which of its own belong to the engine's thread.

    `base`: what the model was loaded from; `settings` reads those of experts, `None` where they have none.
    `open_delta` is `Delta.open` unless a test says otherwise; `closed` is told the salt of every expert that is gone.
    What takes time, opening and checking a delta, is done in `open` alone, on the caller's thread.
    """

    def __init__(
        self,
        layers: ExpertLayers,
        base: Checkpoint | None,
        settings: SettingsReader | None = None,
        *,
        budget: int | None = None,
        device_budget: int | None = None,
        policy: str = "lru",
        allow_quantized_base: bool = False,
        open_delta: Callable[[Path], Any] | None = None,
        closed: Callable[[int], object] | None = None,
        notify: Callable[[], object] = lambda: None,
    ) -> None:
        self._layers: ExpertLayers | None = layers
        self.base, self._settings, self._allow_quantized = base, settings, allow_quantized_base
        self.open_delta = open_delta or (lambda path: Delta.open(path))
        if device_budget is None:
            self.residency = Residency(layers, budget, notify, policy=policy)
        else:
            self.residency = DeviceResidency(layers, budget, device_budget, notify, policy=policy)
        self.catalogue: dict[str, Expert] = {}
        self._retired: set[Expert] = set()  # replaced or removed, and still in use
        self._closed = closed
        self._salts = itertools.count(1)
        self._lock = threading.RLock()  # held for a few lookups at most, since the engine's thread takes it too

    # The catalogue.

    def discover(self, experts: str | Path | Iterable[str | Path] | Mapping[str, str | Path] | None) -> None:
        """Opens a folder of experts, a list of folders, or `{name: folder}`; one delta directory is one expert.

        In a folder of experts a broken one is kept with its error; one that was named raises it.
        """
        if experts is None:
            return
        if is_folder_of_experts(experts):
            self._discover_folder(Path(experts))
            return
        if isinstance(experts, str | Path):
            experts = [experts]
        named = experts if isinstance(experts, Mapping) else _named_after_folders(experts)
        for name, path in named.items():
            self.add(name, Path(path))

    def _discover_folder(self, folder: Path) -> None:
        for path in expert_folders(folder):
            files = stamp(path)
            try:
                self.add_found(path)
            except (MeswitchError, OSError, ValueError) as error:
                self.catalogue[path.name] = Expert(path.name, path, failure=Failure(error, path, files))

    def add_found(self, path: Path) -> Expert:
        """`add` of a folder that was found where experts are, under its own name."""
        return self.add(check_name(path.name), check_folder(path))

    def add(self, name: str, path: Path) -> Expert:
        """`open` and `put`."""
        expert = self.open(name, path)
        self.put(expert)
        return expert

    def put(self, expert: Expert) -> None:
        """Gives an opened expert to every later request for its name.

        Requests that have acquired the expert of that name before finish on it.
        """
        with self._lock:
            old = self.catalogue.get(expert.name)
            if old is not None:
                expert.counts, expert.pinned = old.counts, old.pinned
            self.catalogue[expert.name] = expert
        if old is not None:
            self._retire(old)
        if expert.pinned:
            self.residency.keep(expert)

    def open(self, name: str, path: Path) -> Expert:
        """An expert that can be served, not yet in the catalogue. Raises what is wrong with its name or its delta."""
        check_name(name)
        files = stamp(path)
        layers, delta = self.layers, self.open_delta(path)
        try:
            if delta.kind != "delta":
                raise FormatError(f"expected the delta of an expert, found a quantized model: {path}")
            if self.base is not None:
                delta.check_base(self.base, allow_quantized=self._allow_quantized)
            expert = Expert(name, path, delta, files=files, salt=next(self._salts))
            expert.nbytes, expert.bpw = int(delta.memory_bytes), float(delta.bpw)
            tied = layers.tied
            if self._settings is not None:
                expert.settings = self._settings.read(name, delta)
                tied = bool(expert.settings.config.tie_word_embeddings)
            expert.tied = tied
            outline = list(expert.outline)
            layers.check(outline, tied=tied)
            expert.vocabulary, expert.outputs = layers.vocabulary_of(outline, tied=tied)
            self.residency.enter(expert)
        except BaseException:
            delta.close()
            raise
        return expert

    def fail(self, expert: Expert, error: BaseException) -> None:
        """Takes no more requests for an expert until its files have changed, or some time has passed."""
        if isinstance(error, BudgetError):  # the budget was lowered: nothing is wrong with the expert
            return
        failure = Failure(error, expert.path, expert.files)
        with self._lock:
            expert.failure = failure  # for requests that have acquired it and are still on their way
            if self.catalogue.get(expert.name) is expert:
                broken = Expert(expert.name, expert.path, failure=failure, counts=expert.counts)
                broken.pinned = expert.pinned
                self.catalogue[expert.name] = broken
        self._retire(expert)

    @property
    def layers(self) -> ExpertLayers:
        assert self._layers is not None, "closed"
        return self._layers

    def get(self, name: str) -> Expert:
        """The expert that a new request for `name` runs on.

        Raises `ExpertNotFoundError`, or what is wrong with the expert; one whose files have changed since it went wrong
        is opened again first.
        """
        return self._get(name, uses=0)

    def acquire(self, name: str) -> Expert:
        """`get`, and the expert stays open until it is released."""
        return self._get(name, uses=1)

    def _get(self, name: str, uses: int) -> Expert:
        while True:  # it may be replaced, or go wrong again, between two look-ups
            with self._lock:
                expert = self.catalogue.get(name)
                if expert is not None and expert.failure is None:
                    expert.uses += uses
                    return expert
            if expert is None:
                raise self._not_found(name)
            self._reopen(expert)

    def _reopen(self, broken: Expert) -> None:
        """Opens a broken expert again, if that may help, unless it has been replaced. Raises what is wrong with it."""
        assert broken.failure is not None
        with broken.failure.trying:
            if self.catalogue.get(broken.name) is not broken:
                return
            if broken.path is None or not broken.failure.may_be_over:
                raise fresh(broken.failure.error)
            files = stamp(broken.path)
            try:
                expert = self.open(broken.name, check_folder(broken.path))
            except Exception as error:
                broken.failure.note(error, files)
                raise
            with self._lock:
                current = self.catalogue.get(broken.name) is broken
                if current:
                    self.put(expert)
        if not current:  # it was removed or replaced meanwhile
            self._retire(expert)

    def _not_found(self, name: str) -> ExpertNotFoundError:
        known = sorted(self.catalogue.copy())
        close = difflib.get_close_matches(str(name), known, n=3)
        if close:
            hint = f"did you mean {' or '.join(map(repr, close))}?"
        else:
            hint = f"there are {', '.join(map(repr, known[:8]))}" if known else "the engine has no experts"
        return ExpertNotFoundError(f"unknown expert: {name!r}", hint=hint)

    def remove(self, name: str) -> None:
        """Removes `name`; requests that have acquired its expert finish first. Raises `ExpertNotFoundError`."""
        with self._lock:
            expert = self.catalogue.pop(name, None)
        if expert is None:
            raise self._not_found(name)
        self._retire(expert)

    # Uses.

    def release(self, expert: Expert) -> None:
        """Ends one use of an expert; a removed one that nobody uses is closed."""
        with self._lock:
            expert.uses -= 1
        self._close_if_done(expert)

    def _retire(self, expert: Expert) -> None:
        with self._lock:
            self._retired.add(expert)
        self._close_if_done(expert)

    def _close_if_done(self, expert: Expert) -> None:
        with self._lock:
            if expert not in self._retired or expert.uses:
                return
            self._retired.discard(expert)
            delta, expert.delta = expert.delta, None
        self.residency.let_go(expert)
        self.residency.leave(expert)
        if self._closed is not None:
            self._closed(expert.salt)
        if delta is not None:  # as it is of a broken one
            delta.close()

    # Memory.

    def prefetch(self, name: str) -> None:
        """Loads an expert where there is room for it."""
        self.residency.prefetch(self.get(name))

    def pin(self, name: str) -> None:
        """Never evicts an expert once it is in memory, and loads it when there is room.

        Raises `BudgetError` where the pinned experts would not fit together.
        """
        while True:  # it may be replaced between two look-ups
            expert = self.get(name)  # without the lock, since it may have to be opened again
            with self._lock:
                if self.catalogue.get(name) is expert:
                    self._check_pinned_room(expert)
                    self.residency.keep(expert)
                    return

    def _check_pinned_room(self, expert: Expert) -> None:
        others = sum(other.nbytes for other in self.catalogue.values() if other.pinned and other is not expert)
        budget, name = self.residency.budget, self.residency.budget_name
        if budget is not None and others + expert.nbytes > budget:
            raise BudgetError(
                f"pinned experts would need {others + expert.nbytes} bytes, {name} is {budget} bytes",
                hint=f"raise {name}, or unpin others",
            )

    def unpin(self, name: str) -> None:
        """Ends what `pin` began."""
        with self._lock:
            expert = self.catalogue.get(name)
            if expert is None:
                raise self._not_found(name)
            self.residency.let_go(expert)

    def close(self) -> None:
        """Closes every expert, and lets go of the model and of the base's files."""
        with self._lock:
            experts = {*self.catalogue.values(), *self._retired}
            self.catalogue.clear()
            self._retired.clear()
        self.residency.close()
        for expert in experts:
            delta, expert.delta = expert.delta, None
            if delta is not None:
                delta.close()
        self._layers = self._closed = self.base = None

    def describe(self) -> dict[str, dict[str, Any]]:
        """By name: `path`, `residency` ("disk", "host" or "device"), `bytes`, `bpw`, `uses`, `pinned`, `error`, and
        what its `counts` say. Waits for no lock."""
        experts = self.catalogue.copy()  # in one piece, whatever other threads do
        return {
            name: {
                "path": str(expert.path),
                "residency": self.residency.where(expert),
                "bytes": expert.nbytes,
                "bpw": expert.bpw,
                "uses": expert.uses,
                "pinned": expert.pinned,
                "error": None if expert.failure is None else str(expert.failure),
                **expert.counts.describe(),
            }
            for name, expert in sorted(experts.items())
        }


def _named_after_folders(folders: Iterable[str | Path]) -> dict[str, Path]:
    """Every delta directory under its own name. Raises `ExpertNameError` where two have the same."""
    paths = [Path(path).absolute() for path in folders]
    named = {path.name: path for path in paths}
    if len(named) < len(paths):
        raise ExpertNameError(
            f"expected a name for each of {len(paths)} experts, found {len(named)}: {', '.join(named)}",
            hint="pass {name: directory} where directories have the same name",
        )
    return named
