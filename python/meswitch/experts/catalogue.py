"""One expert, and which names and folders are safe for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from meswitch.delta.directory import MANIFEST
from meswitch.errors import ExpertNameError
from meswitch.experts.counts import ExpertCounts
from meswitch.experts.failure import Failure, Stamp
from meswitch.experts.settings import ModelSettings
from meswitch.site import Site


def check_folder(folder: Path) -> Path:
    """`folder`, if it does not lead out of its parent by a symbolic link. Raises `ExpertNameError`."""
    if folder.is_symlink() and folder.resolve().parent != folder.parent.resolve():
        raise ExpertNameError(
            f"a symbolic link that leads out of {folder.parent}: {folder.name}",
            hint="pass the expert as {name: path} if that is meant",
        )
    return folder


def is_folder_of_experts(experts: Any) -> TypeGuard[str | Path]:
    """Whether what an engine was given is a folder of delta directories, and not one itself."""
    return isinstance(experts, str | Path) and not (Path(experts) / MANIFEST).is_file()


def expert_folders(folder: Path) -> list[Path]:
    """What could be an expert below `folder`, by name: every folder that is not hidden, and every link."""
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return sorted(path for path in paths if path.is_dir() or path.is_symlink())


@dataclass(eq=False)
class Expert:
    """One fine-tune that requests can name.

    It is opened (`delta`, `settings`; `nbytes`: the memory that it takes while resident, `bpw`: the delta's) or broken
    (`failure`); `files` is the stamp of its directory from before it was opened. `tied`: whether its lm_head is its
    embeddings. `vocabulary` and `outputs`: token ids that it reads, and those it can answer with. `salt` keeps its
    prefix-cache pages apart from other experts' and earlier generations'. `unit`: its number in the native residency
    of what is in the layers, `host_unit`: in that of the host's memory, where it is another.
    `slot`: its adapter slot while resident. `uses` counts requests that have acquired it, `leases` keep it in memory,
    one for each request that runs on it. `pinned`: it is not evicted once it is resident, by `kept`. `counts` go on
    when the expert is replaced.
    """

    name: str
    path: Path | None = None
    delta: Any = None
    settings: ModelSettings | None = None
    failure: Failure | None = None
    files: Stamp | None = None
    nbytes: int = 0
    bpw: float | None = None
    tied: bool = True
    vocabulary: int = 0
    outputs: int = 0
    salt: int = 0
    unit: int | None = None
    host_unit: int | None = None
    slot: int | None = None
    uses: int = 0
    leases: list[Any] = field(default_factory=list)
    pinned: bool = False
    kept: Any = None
    counts: ExpertCounts = field(default_factory=ExpertCounts)

    @property
    def outline(self) -> Iterable[Site]:
        """Its sites, with tensors that have no content."""
        return () if self.delta is None else self.delta.outline.values()
