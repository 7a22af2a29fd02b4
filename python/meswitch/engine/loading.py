"""A base as an engine serves it: loaded, wrapped, batched, and tried with one token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

from meswitch.batching import attention
from meswitch.batching.bridge import PagedBatch
from meswitch.batching.cache import CachePlan, cache_geometry, plan_cache
from meswitch.batching.compatibility import check_supported, check_transformers
from meswitch.batching.sampler import RequestSampler, SamplingState
from meswitch.batching.scheduler import ExpertScheduler, RequestSlot
from meswitch.engine.offloaded import OffloadedExperts, Offloading, load_offloaded
from meswitch.engine.packed import Packed, load_packed
from meswitch.errors import BudgetError, MeswitchError, UnsupportedModelError
from meswitch.experts.settings import SettingsReader
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.config import context_limit
from meswitch.huggingface.models import load_model, own_weights
from meswitch.kernels.invariance import BatchInvariance
from meswitch.kernels.select import select_kernels
from meswitch.layers.install import ExpertLayers

_DEFAULT_KV_BYTES = 2**30


@dataclass
class Settings:
    """What an engine was made with, checked. Budgets are bytes."""

    base: Path
    dtype: Any
    exact: bool
    kernels: str
    device: torch.device
    host_budget: int | None
    device_budget: int | None
    kv_budget: int | None
    max_batch_tokens: int
    max_waiting: int | None
    max_experts: int | None
    eviction: str
    allow_quantized_base: bool
    offloading: Offloading | None


@dataclass
class LoadedBase:
    """`base`: what `model` was loaded from. `arithmetic`: what a step runs under. `plain_attention`: what the base
    attends with outside of continuous batching. `moe`: the MoE experts, where they are read when they are chosen."""

    base: Checkpoint
    model: Any
    text_config: Any
    layers: ExpertLayers
    settings_reader: SettingsReader
    plan: CachePlan
    sampler: RequestSampler
    batch: PagedBatch
    arithmetic: Callable[[], contextlib.AbstractContextManager[Any]]
    plain_attention: Any
    moe: OffloadedExperts | None


def load_base(settings: Settings, run: Callable[[Callable[[], bool]], bool]) -> LoadedBase:
    """Loads a base on the calling thread, which runs every step from then on.

    `run` calls a function on that thread, whichever thread it is called from. Raises what is wrong with the base, or
    `BudgetError`.
    """
    check_transformers(settings.device)
    base, packed, moe = Checkpoint(settings.base), Packed(), None
    kernels = select_kernels(settings.kernels, settings.device, exact=settings.exact)
    if settings.offloading is not None:
        model, moe = load_offloaded(base, settings.dtype or "auto", settings.offloading, kernels, check_supported)
    elif base.is_quantized:
        model, packed = load_packed(base, settings.dtype or "auto", check_supported)
    else:
        model = load_model(base, settings.dtype or "auto", check=check_supported)
    own_weights(model, settings.device)
    base.sample()  # what experts are compared with, taken now: the file may be cut while it is served
    model = model.eval().requires_grad_(False)
    if settings.exact and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # products of rows with one matrix, which can be kept apart
    text_config = model.config.get_text_config(decoder=True)
    layers = ExpertLayers(model, kernels, run, packed.weights, packed.moe_experts)
    paged = attention.can_be_paged(model)
    plain = attention.plain_attention(model)
    plan = _plan_cache(settings, model, text_config, masks=not paged)
    sampler = RequestSampler()
    batch = _start_batching(settings, model, plan, sampler, paged=paged)
    loaded = LoadedBase(
        base,
        model,
        text_config,
        layers,
        SettingsReader(settings.base, text_config),
        plan,
        sampler,
        batch,
        BatchInvariance if settings.exact else contextlib.nullcontext,
        plain,
        moe,
    )
    _try_step(loaded)
    return loaded


def _plan_cache(settings: Settings, model: Any, text_config: Any, *, masks: bool) -> CachePlan:
    steps, budget = settings.max_batch_tokens, settings.kv_budget
    geometry = cache_geometry(text_config, model.dtype, masks=masks)
    if budget is None:
        tokens = max(4 * context_limit(text_config)[0], 8192)
        budget = min(geometry.need(tokens, steps), max(_DEFAULT_KV_BYTES, geometry.need(512, steps)))
    return plan_cache(text_config, model.dtype, budget, max_batch_tokens=steps, masks=masks)


def _start_batching(
    settings: Settings, model: Any, plan: CachePlan, sampler: RequestSampler, *, paged: bool
) -> PagedBatch:
    plan_attention = attention.plan_invariant_attention if settings.exact else attention.plan_attention
    try:
        batch = PagedBatch(
            model,
            page_size=plan.page_size,
            blocks=plan.blocks,
            max_batch_tokens=plan.max_batch_tokens,
            scheduler=ExpertScheduler,
            sampler=sampler,
            attention=attention.PAGED if paged else None,
            plan_attention=plan_attention if paged else None,
        )
    except MemoryError as error:
        raise BudgetError(f"kv_budget: {plan.nbytes} bytes do not fit this machine: {error}") from error
    plan.check(batch.nbytes)
    return batch


def _try_step(loaded: LoadedBase) -> None:
    """One token through the base, so that a model that asks for more than a step gives is refused at start."""
    name, batch = "start", loaded.batch
    batch.scheduler.slots[name] = RequestSlot()
    loaded.sampler.states[name] = SamplingState(LogitsProcessorList(), loaded.layers.outputs)
    batch.add(name, [0], 1, ())
    batch.prepare()
    try:
        with loaded.arithmetic():
            batch.run()
    except MeswitchError:
        raise
    except Exception as error:  # whatever a model does with a cache that is not its own
        raise UnsupportedModelError(
            f"{type(loaded.model).__name__} cannot run under continuous batching: its first step failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    batch.update()
    del batch.scheduler.slots[name], loaded.sampler.states[name]
