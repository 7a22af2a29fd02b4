"""A base whose MoE experts are read when a gate chooses them: how an engine was asked to, and what it then has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from meswitch.engine.sampling import check_whole_number
from meswitch.errors import RequestError
from meswitch.huggingface.checkpoint import Checkpoint, resolve
from meswitch.huggingface.models import Check
from meswitch.huggingface.names import ParameterNames
from meswitch.kernels.protocol import Kernels
from meswitch.layers.moe import packed_experts
from meswitch.moe.copies import find_copies, load_copies
from meswitch.moe.exact import ExactExperts
from meswitch.moe.extents import Stack
from meswitch.moe.fallback import FallbackExperts
from meswitch.moe.gate import take_gates
from meswitch.moe.packed import PackedResidents
from meswitch.moe.profile import MoeProfile, choose_sets
from meswitch.moe.resident import ExactResidents, Residents
from meswitch.moe.store import MoeStore
from meswitch.moe.swaps import ExpertSwaps, SwapAllowance, first_importance
from meswitch.moe.trunk import load_trunk
from meswitch.sizes import parse_bytes

MODES = ("exact", "fallback", "virtual")
DEFAULT_SWAP_RATE = 64 * 2**20


@dataclass(frozen=True)
class Offloading:
    """`budget` in bytes. `copies`: the quantized model that light choices fall back to, or whose MoE experts are
    resident. `fetched`: how many choices of a token are exact in any case, in the mode "fallback". `profile`: which MoE
    experts a task needs; `swap_rate`: bytes a second that resident sets may read, 0 for sets that stay as they are;
    both in the mode "virtual". `trace`: a file to write one to, in the other modes."""

    budget: int
    mode: str
    copies: Path | None
    fetched: int
    profile: MoeProfile | None
    swap_rate: int
    trace: Path | None

    @classmethod
    def of(
        cls,
        budget: int | str | None,
        mode: str,
        copies: str | Path | None,
        fetched: int,
        profile: str | Path | None,
        swap_rate: int | str | None,
        trace: str | Path | None,
        *,
        cpu: bool,
        exact: bool,
    ) -> Offloading | None:
        """What `Engine` was given, checked. Raises `RequestError`, and what reading a profile raises."""
        if mode not in MODES:
            raise RequestError(f"moe_mode: expected one of {', '.join(MODES)}, found {mode!r}")
        if (copies is None and mode == "fallback") or (copies is not None and mode == "exact"):
            raise RequestError(
                f"moe_copies: expected a folder with moe_mode='fallback', none with 'exact', found {copies!r}"
            )
        if check_whole_number("moe_fetched", fetched, least=1) != 1 and mode != "fallback":
            raise RequestError(f"moe_fetched: expected moe_mode='fallback' beside it, found {mode!r}")
        for name, value in (("moe_profile", profile), ("moe_swap_rate", swap_rate)):
            if value is not None and mode != "virtual":
                raise RequestError(f"{name}: expected moe_mode='virtual' beside it, found {mode!r}")
        if trace is not None and mode == "virtual":
            raise RequestError("moe_trace: expected moe_mode='exact' or 'fallback' beside it, found 'virtual'")
        parsed = parse_bytes(budget, "moe_budget")
        if parsed is None:
            if mode != "exact":
                raise RequestError(f"moe_budget: expected a number of bytes with moe_mode={mode!r}, found None")
            if trace is not None:
                raise RequestError(f"moe_trace: expected None without moe_budget, found {str(trace)!r}")
            return None
        if not cpu:
            raise RequestError("moe_budget: expected the device cpu beside it, found another")
        if exact and mode != "exact":
            raise RequestError(
                f"exact: expected False with moe_mode={mode!r}, whose answers depend on what is in memory"
            )
        return cls(
            parsed,
            mode,
            None if copies is None else Path(resolve(copies)),
            fetched,
            None if profile is None else MoeProfile.read(Path(profile)),
            DEFAULT_SWAP_RATE if swap_rate is None else parse_rate(swap_rate, "moe_swap_rate") or 0,
            None if trace is None else Path(trace),
        )


def parse_rate(rate: int | str | None, what: str) -> int | None:
    """`parse_bytes`, of bytes a second: they may be 0."""
    return 0 if str(rate).strip() == "0" else parse_bytes(rate, what)


class OffloadedExperts(Protocol):
    """The MoE experts of a loaded base. `counters` may be called from any thread, the rest on the engine's."""

    def begin_step(self, tokens: int) -> None:
        """Before a step of so many tokens."""

    def end_step(self) -> None:
        """After it, also where it failed."""

    def counters(self) -> dict[str, Any]:
        """Counts since the start, and bytes; those of the end once it is closed."""

    def close(self) -> None:
        """Frees the memory."""


class FetchedExperts:
    """`OffloadedExperts` that a step reads where they are not in memory."""

    def __init__(self, store: MoeStore, modules: list[ExactExperts]) -> None:
        self._store = store
        self._fallbacks = [module for module in modules if isinstance(module, FallbackExperts)]

    def begin_step(self, tokens: int) -> None:
        """Nothing: what a step needs is known when gates have chosen."""

    def end_step(self) -> None:
        """Nothing."""

    def counters(self) -> dict[str, Any]:
        """`MoeStore.counters`; with copies also `choices` of all tokens, and `copied`, those that copies answered."""
        counters = self._store.counters()
        if self._fallbacks:
            counters |= {name: sum(getattr(own, name) for own in self._fallbacks) for name in ("choices", "copied")}
        return counters

    def close(self) -> None:
        self._store.close()


def load_offloaded(
    base: Checkpoint, dtype: str | torch.dtype, asked: Offloading, kernels: Kernels, check: Check
) -> tuple[Any, OffloadedExperts]:
    """The model, and its MoE experts; a trace begins before any of them is read.

    Raises what `load_trunk`, `MoeStore` and its `start_trace`, `load_copies`, `take_gates`, `choose_sets`,
    `MoeProfile.check` and `ExpertSwaps` raise.
    """
    model, stacks = load_trunk(base, dtype, check=check)
    choices = getattr(model.config.get_text_config(decoder=True), "num_experts_per_tok", 1)
    if asked.mode == "virtual":
        return model, _keep_residents(base, model, stacks, asked, kernels, choices)
    copies = {} if asked.copies is None else load_copies(asked.copies, base)
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
    return model, FetchedExperts(store, modules)


def _keep_residents(
    base: Checkpoint, model: Any, stacks: dict[str, dict[str, Stack]], asked: Offloading, kernels: Kernels, choices: int
) -> ExpertSwaps:
    """Reads the first resident sets, and restricts gates to them."""
    profile = asked.profile
    counts = {name: len(next(iter(module.values())).extents) for name, module in stacks.items()}
    if profile is not None:
        profile.check(base, counts)
    gates = take_gates(model)
    modules = {name: model.get_submodule(name) for name in stacks}
    residents: Residents
    if asked.copies is None:
        residents = exact = ExactResidents(asked.budget, stacks)
        for module, layer in zip(modules.values(), exact.layers, strict=True):
            module.forward = ExactExperts(module, layer)
    else:
        residents = _packed_residents(base, model, modules, asked.copies, asked.budget, kernels)
    sets = choose_sets(counts.values(), residents.sizes, asked.budget, least=choices, profile=profile)
    allowance = SwapAllowance(asked.swap_rate, max(residents.sizes)) if asked.swap_rate else None
    importance = first_importance(counts.values(), profile)
    return ExpertSwaps(gates, residents, importance, sets, least=choices, allowance=allowance, norms=profile is None)


def _packed_residents(
    base: Checkpoint, model: Any, modules: dict[str, Any], copies: Path, budget: int, kernels: Kernels
) -> PackedResidents:
    place = ParameterNames(model).stack_place
    delta, sites = find_copies(copies, base)
    layers = [packed_experts(module, kernels, place, ()) for module in modules.values()]
    for layer in layers:
        layer.attach()
    places = [{found: site for site in sites[name] if (found := place(site.name))} for name in modules]
    return PackedResidents(budget, delta, layers, places)
