"""A base whose MoE experts are read when a gate chooses them: how an engine was asked to, and what it then has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch.engine.sampling import check_whole_number
from meswitch.errors import RequestError
from meswitch.huggingface.checkpoint import Checkpoint, resolve
from meswitch.huggingface.models import Check
from meswitch.huggingface.names import ParameterNames
from meswitch.kernels.protocol import Kernels
from meswitch.layers.moe import packed_experts
from meswitch.moe.copies import load_copies
from meswitch.moe.exact import ExactExperts
from meswitch.moe.fallback import FallbackExperts
from meswitch.moe.store import MoeStore
from meswitch.moe.trunk import load_trunk
from meswitch.sizes import parse_bytes

MODES = ("exact", "fallback")


@dataclass(frozen=True)
class Offloading:
    """`budget` in bytes. `copies`: the quantized model that light choices fall back to; `None` where every choice is
    exact. `fetched`: how many choices of a token are exact in any case. `trace`: a file to write one to."""

    budget: int
    copies: Path | None
    fetched: int
    trace: Path | None

    @classmethod
    def of(
        cls,
        budget: int | str | None,
        mode: str,
        copies: str | Path | None,
        fetched: int,
        trace: str | Path | None,
        *,
        cpu: bool,
        exact: bool,
    ) -> Offloading | None:
        """What `Engine` was given, checked. Raises `RequestError`."""
        if mode not in MODES:
            raise RequestError(f"moe_mode: expected one of {', '.join(MODES)}, found {mode!r}")
        if (copies is None) == (mode == "fallback"):
            raise RequestError(f"moe_copies: expected a folder with moe_mode='fallback' alone, found {copies!r}")
        parsed = parse_bytes(budget, "moe_budget")
        if parsed is None:
            if copies is not None:
                raise RequestError("moe_budget: expected a number of bytes with moe_mode='fallback', found None")
            if trace is not None:
                raise RequestError(f"moe_trace: expected None without moe_budget, found {str(trace)!r}")
            return None
        if not cpu:
            raise RequestError("moe_budget: expected the device cpu beside it, found another")
        if exact and copies is not None:
            raise RequestError(
                "exact: expected False with moe_mode='fallback', whose answers depend on what is in memory"
            )
        fetched = check_whole_number("moe_fetched", fetched, least=1)
        return cls(
            parsed,
            None if copies is None else Path(resolve(copies)),
            fetched,
            None if trace is None else Path(trace),
        )


class OffloadedExperts:
    """The MoE experts of a loaded base. `counters` may be called from any thread, the rest on the engine's."""

    def __init__(self, store: MoeStore, modules: list[ExactExperts]) -> None:
        self._store = store
        self._fallbacks = [module for module in modules if isinstance(module, FallbackExperts)]

    def counters(self) -> dict[str, Any]:
        """`MoeStore.counters`; with copies also `choices` of all tokens, and `copied`, those that copies answered."""
        counters = self._store.counters()
        if self._fallbacks:
            counters |= {name: sum(getattr(own, name) for own in self._fallbacks) for name in ("choices", "copied")}
        return counters

    def close(self) -> None:
        """Frees the memory."""
        self._store.close()


def load_offloaded(
    base: Checkpoint, dtype: str | torch.dtype, asked: Offloading, kernels: Kernels, check: Check
) -> tuple[Any, OffloadedExperts]:
    """The model, and the MoE experts that it reads; the trace begins before any of them is read.

    Raises what `load_trunk`, `MoeStore`, `MoeStore.start_trace` and `load_copies` raise.
    """
    model, stacks = load_trunk(base, dtype, check=check)
    copies = {} if asked.copies is None else load_copies(asked.copies, base)
    choices = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", 1)
    store = MoeStore(asked.budget, stacks, min(asked.fetched, choices) if copies else choices)
    if asked.trace is not None:
        store.start_trace(asked.trace)
    modules: list[ExactExperts] = []
    place = ParameterNames(model).stack_place
    for name, layer in store.layers.items():
        module = model.get_submodule(name)
        if copies:
            packed = packed_experts(module, kernels, place, copies[name])
            modules.append(FallbackExperts(module, layer, packed, asked.fetched))
        else:
            modules.append(ExactExperts(module, layer))
        module.forward = modules[-1]
    return model, OffloadedExperts(store, modules)
