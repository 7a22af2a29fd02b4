"""The experts of one engine: names to opened deltas, and who uses them.

catalogue   name -> Expert    what a new request gets; replaced and removed experts leave it at once
Expert      uses              requests that have acquired it, waiting or running; a retired one is closed at 0
            pins, slot        see `residency`
"""

from __future__ import annotations

import difflib
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from meswitch.delta.directory import MANIFEST, Delta
from meswitch.errors import (
    BudgetError,
    ExpertNameError,
    ExpertNotFoundError,
    MeswitchError,
    fresh,
)
from meswitch.expert_name import check_name
from meswitch.experts.catalogue import Expert, check_folder
from meswitch.experts.residency import Residency
from meswitch.experts.settings import SettingsReader
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.layers.install import ExpertLayers


class ExpertPool:
    """The experts of one engine.

    `base`: what the model was loaded from; `settings` reads those of experts, `None` where they have none.
    `open_delta` is `Delta.open` unless a test says otherwise; `closed` is told the salt of every expert that is gone.
    `put`, `remove` and `release` change the layers and run on the engine's thread, as does everything of `residency`.
    The rest may be called from any thread: what takes time, opening and checking a delta, is done in `open` alone.
    """

    def __init__(
        self,
        layers: ExpertLayers,
        base: Checkpoint | None,
        settings: SettingsReader | None = None,
        *,
        budget: int | None = None,
        open_delta: Callable[[Path], Any] | None = None,
        closed: Callable[[int], None] | None = None,
    ) -> None:
        self._layers: ExpertLayers | None = layers
        self.base, self._settings = base, settings
        self.open_delta = open_delta or (lambda path: Delta.open(path))
        self.residency = Residency(layers, budget)
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
        if isinstance(experts, str | Path):
            if not (Path(experts) / MANIFEST).is_file():
                self._discover_folder(Path(experts))
                return
            experts = [experts]
        named = experts if isinstance(experts, Mapping) else _named_after_folders(experts)
        for name, path in named.items():
            self.add(name, Path(path))

    def _discover_folder(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or not (path.is_dir() or path.is_symlink()):
                continue
            try:
                self.add(check_name(path.name), check_folder(path))
            except (MeswitchError, OSError, ValueError) as error:
                self.catalogue[path.name] = Expert(path.name, path, error=fresh(error))

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
            self.catalogue[expert.name] = expert
        if old is not None:
            self._retire(old)

    def open(self, name: str, path: Path) -> Expert:
        """An expert that can be served, not yet in the catalogue. Raises what is wrong with its name or its delta."""
        check_name(name)
        layers, delta = self.layers, self.open_delta(path)
        try:
            if self.base is not None:
                delta.check_base(self.base)
            expert = Expert(
                name, path, delta, nbytes=int(delta.memory_bytes), bpw=float(delta.bpw), salt=next(self._salts)
            )
            tied = layers.tied
            if self._settings is not None:
                expert.settings = self._settings.read(name, delta)
                tied = bool(expert.settings.config.tie_word_embeddings)
            expert.tied = tied
            outline = list(expert.outline)
            layers.check(outline, tied=tied)
            expert.vocabulary, expert.outputs = layers.vocabulary_of(outline, tied=tied)
            budget = self.residency.budget
            if budget is not None and expert.nbytes > budget:
                raise BudgetError(
                    f"expert {name!r} needs {expert.nbytes} bytes, host_budget is {budget} bytes",
                    hint="raise host_budget, or compress with fewer bits",
                )
        except BaseException:
            delta.close()
            raise
        return expert

    @property
    def layers(self) -> ExpertLayers:
        assert self._layers is not None, "closed"
        return self._layers

    def get(self, name: str) -> Expert:
        """The expert that a new request for `name` runs on. Raises `ExpertNotFoundError`, or the expert's own
        error."""
        return self._get(name, uses=0)

    def acquire(self, name: str) -> Expert:
        """`get`, and the expert stays open until it is released."""
        return self._get(name, uses=1)

    def _get(self, name: str, uses: int) -> Expert:
        with self._lock:
            expert = self.catalogue.get(name)
            if expert is not None and expert.error is None:
                expert.uses += uses
                return expert
        if expert is None:
            raise self._not_found(name)
        assert expert.error is not None
        raise fresh(expert.error)

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
        """Ends one use of an expert; a removed one that nobody uses is closed. On the engine's thread."""
        with self._lock:
            expert.uses -= 1
        self._close_if_done(expert)

    def _retire(self, expert: Expert) -> None:
        self._retired.add(expert)
        self._close_if_done(expert)

    def _close_if_done(self, expert: Expert) -> None:
        if expert not in self._retired or expert.uses:
            return
        self._retired.discard(expert)
        self.residency.evict(expert)
        if self._closed is not None:
            self._closed(expert.salt)
        if expert.delta is not None:  # as it is of a broken one
            expert.delta.close()
            expert.delta = None

    def close(self) -> None:
        """Closes every expert, and lets go of the model and of the base's files."""
        with self._lock:
            experts = {*self.catalogue.values(), *self._retired}
            self.catalogue.clear()
        for expert in experts:
            expert.uses = expert.pins = 0
            self._retire(expert)
        self.residency.close()
        self._layers = self._closed = self.base = None

    def describe(self) -> dict[str, dict[str, Any]]:
        """By name: `path`, `residency` ("disk" or "host"), `bytes`, `bpw`, `uses`, `served`, `error`. Waits for no
        lock."""
        experts = self.catalogue.copy()  # in one piece, whatever other threads do
        return {
            name: {
                "path": str(expert.path),
                "residency": "disk" if expert.slot is None else "host",
                "bytes": expert.nbytes,
                "bpw": expert.bpw,
                "uses": expert.uses,
                "served": expert.served,
                "error": None if expert.error is None else f"{type(expert.error).__name__}: {expert.error}",
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
