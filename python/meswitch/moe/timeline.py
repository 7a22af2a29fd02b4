"""Which MoE experts were in memory when, layer by layer, as a trace of them says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meswitch import _native
from meswitch.errors import DataError

BINS = 400
"""The parts that the time is cut into."""

_MOST_MOE_EXPERTS = 1 << 16
_UNIT = re.compile(r"(?P<layer>.+)\.(?P<stack>[^.]+)\[(?P<number>\d{1,9})\]")


@dataclass(frozen=True)
class LayerTimeline:
    """The MoE experts of one module.

    `requests`, `hits`: matrices that its steps needed, and those of them that were in memory. `nbytes`: of one MoE
    expert. `resident`: float32 `[MoE experts, BINS]`, which share of a MoE expert's bytes was in memory, as a mean over
    a part of the time.
    """

    name: str
    requests: int
    hits: int
    nbytes: int
    resident: NDArray[np.float32]

    @property
    def hit_rate(self) -> float | None:
        """`None` where nothing was needed."""
        return self.hits / self.requests if self.requests else None

    @property
    def resident_share(self) -> float:
        """A mean over the MoE experts and the time."""
        return float(self.resident.mean(dtype=np.float64))


@dataclass(frozen=True)
class MoeTimeline:
    """`seconds`: from the start of the trace to its last event. `layers`: in the order in which they run."""

    seconds: float
    layers: list[LayerTimeline]

    @property
    def hit_rate(self) -> float:
        return sum(layer.hits for layer in self.layers) / sum(layer.requests for layer in self.layers)

    @property
    def resident_share(self) -> float:
        """A mean over the bytes of all MoE experts and the time."""
        weights = [layer.nbytes * len(layer.resident) for layer in self.layers]
        return float(np.average([layer.resident_share for layer in self.layers], weights=weights))

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "hit_rate": self.hit_rate,
            "resident_share": self.resident_share,
            "layers": {
                layer.name: {
                    "moe_experts": len(layer.resident),
                    "requests": layer.requests,
                    "hits": layer.hits,
                    "hit_rate": layer.hit_rate,
                    "resident_share": layer.resident_share,
                }
                for layer in self.layers
            },
        }


def read_timeline(trace: Path) -> MoeTimeline:
    """What a trace of MoE experts says, as `Engine(moe_trace=)` writes it.

    All layers are taken to have as many MoE experts as the greatest number in the trace tells of; those that were never
    needed were never in memory. Raises `DataError` for a trace that is broken, has no requests or is not of MoE
    experts, and `OSError`.
    """
    read = _native.Timeline(trace)
    layers: dict[str, list[tuple[int, str, int]]] = {}  # by module, the units: place, stack, MoE expert
    units = read.units()
    for place, (name, *_) in enumerate(units):
        found = _UNIT.fullmatch(name)
        if found is None:
            raise DataError(
                f"{trace}: expected matrices of MoE experts such as 'model.layers.3.mlp.experts.down_proj[17]', "
                f"found {name!r}",
                hint="a trace of experts is for meswitch replay; Engine(moe_trace=FILE) writes one of MoE experts",
            )
        layers.setdefault(found["layer"], []).append((place, found["stack"], int(found["number"])))
    count = 1 + max(number for own in layers.values() for _, _, number in own)
    if count * len(layers) > _MOST_MOE_EXPERTS:
        raise DataError(
            f"{trace}: expected at most {_MOST_MOE_EXPERTS} MoE experts, found {count} in each of {len(layers)} layers"
        )
    if not any(nbytes for _, nbytes, *_ in units):
        raise DataError(f"{trace}: expected matrices of some bytes, found none")
    return MoeTimeline(read.seconds, [_layer(read, units, name, own, count) for name, own in layers.items()])


def _layer(
    read: _native.Timeline,
    units: list[tuple[str, int, int, int]],
    name: str,
    own: list[tuple[int, str, int]],
    count: int,
) -> LayerTimeline:
    sizes = {stack: units[place][1] for place, stack, _ in own}  # all matrices of a stack have the same
    resident = np.zeros((count, BINS), np.float32)
    for place, stack, number in own:
        resident[number] += sizes[stack] * np.array(read.residency(place, BINS), np.float32)
    nbytes = sum(sizes.values())
    resident /= max(nbytes, 1)
    requests, hits = (sum(counts) for counts in zip(*(units[place][2:] for place, _, _ in own), strict=True))
    return LayerTimeline(name, requests, hits, nbytes, resident)
