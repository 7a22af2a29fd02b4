"""What can be served: which versions of transformers, and which models.

`check_transformers` runs a tiny random model through `PagedBatch`, the way the engine does, and looks at everything
that another version could do otherwise without an exception:

    prefixes     one prompt for two experts and for one expert twice; pages shared by the latter alone
    rows         a request without a new token before others; every row of logits compared with a plain forward pass
    attention    a sliding window and soft-capped logits, prompts in pieces; host lengths compared with the device's
    sampling     a request whose processors force a token gets that token; processors know the end of a sequence
    liveness     cancelling a request lets others in again; tokens come without transformers' output router
    size         the cache has the size that was planned

Threads: runs on the thread that calls it. Memory: some hundred kilobytes, freed again.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig, LogitsProcessorList

from meswitch.batching.attention import PAGED, AttentionPlan, plan_attention, switched_attention
from meswitch.batching.bridge import PagedBatch, changed
from meswitch.batching.cache import cache_geometry, plan_cache
from meswitch.batching.sampler import RequestSampler, SamplingState, logits_processors
from meswitch.batching.scheduler import ExpertScheduler, RequestSlot
from meswitch.batching.signatures import check_signatures
from meswitch.batching.step import CacheAccess
from meswitch.errors import TransformersVersionError, UnsupportedModelError

_VOCABULARY, _PAGE, _STEP, _WINDOW = 48, 4, 12, 6
_FORCED = 7  # the token that one request's processors force
_checked: set[tuple[str, str]] = set()
_lock = threading.Lock()


# models


def check_supported(config: Any, model: Any) -> None:
    """Raises `UnsupportedModelError` for what continuous batching would answer wrongly.

    `model`: the model, its class, or `None`.
    """
    name = config.model_type if model is None else getattr(model, "__name__", type(model).__name__)
    text = config.get_text_config(decoder=True)
    reason = None
    if getattr(text, "is_heterogeneous", False):
        reason = "its layers differ from each other (per_layer_config)"
    elif config.is_encoder_decoder:
        reason = "it is an encoder-decoder model"
    elif getattr(model, "_is_stateful", False):
        reason = "its state is more than a cache of keys and values"
    elif not getattr(model, "_supports_attention_backend", False):
        reason = "its attention ignores the paged cache (no attention backend)"
    elif getattr(text, "num_kv_shared_layers", 0):
        reason = "its layers share keys and values"
    elif getattr(text, "kv_lora_rank", None) is not None:
        reason = "its keys and values are latent (kv_lora_rank)"
    elif isinstance(model, torch.nn.Module) and any(map(_numbers_positions, model.modules())):
        reason = "it numbers its tokens in a way of its own"
    if reason is not None:
        raise UnsupportedModelError(f"{name} cannot run under continuous batching: {reason}")
    cache_geometry(text, torch.float32)


def _numbers_positions(module: torch.nn.Module) -> bool:
    """RoBERTa's embeddings count from behind the padding id, unless they are given positions as a step gives them."""
    return hasattr(module, "create_position_ids_from_input_ids")


# transformers


def check_transformers(device: torch.device | str = "cpu") -> None:
    """Raises `TransformersVersionError` where the installed transformers does otherwise than continuous batching relies
    on; looks once a process, version and kind of device. Leaves the global random state as it is."""
    key = transformers.__version__, torch.device(device).type
    with _lock:
        if key not in _checked:
            run_checks(device)
            _checked.add(key)


def run_checks(device: torch.device | str = "cpu") -> None:
    """What `check_transformers` does, each time."""
    check_signatures()
    state = torch.get_rng_state()
    try:
        with torch.inference_mode():
            _check_prefixes(device)
            _check_windows(device)
    except TransformersVersionError:
        raise
    except Exception as error:
        raise changed(f"a step with a tiny model failed: {type(error).__name__}: {error}") from error
    finally:
        torch.set_rng_state(state)


def _expect(right: bool, what: str) -> None:
    if not right:
        raise changed(what)


def _check_prefixes(device: torch.device | str) -> None:
    """Two experts with one prompt, and rows of requests that have no new token yet."""
    trial = _Trial(["full_attention", "full_attention"], None, device)
    batch, prompt, longer = trial.batch, list(range(10, 19)), [*range(30, 47), 3]
    _expect(batch.shares_prefixes, "layers of full attention share no prefixes")
    trial.add("first", prompt, RequestSlot(0, 1))
    _expect("first" in trial.step(), "a request is waiting, but is not scheduled")
    trial.check_called()
    trial.add("other", prompt, RequestSlot(1, 2), forced=True)
    trial.add("again", prompt, RequestSlot(0, 1))
    counts = trial.step()
    _expect(counts.keys() == {"first", "other", "again"}, "requests are waiting, but are not scheduled")
    _expect(counts["other"] == len(prompt), "experts share prefixes: search_prefix_match is not asked as before")
    _expect(counts["again"] == 1, "an expert does not find its own prefix")
    first, other, again = (batch.pages(name) for name in ("first", "other", "again"))
    _expect(not first & other, "experts share pages: mark_complete_blocks is not told as before")
    _expect(len(first & again) == len(prompt) // _PAGE, "an expert does not share its own pages")
    trial.add("base", prompt, RequestSlot())
    trial.step()
    _expect(not batch.pages("base") & (first | other), "the base shares pages with an expert")
    trial.add("longer", longer, RequestSlot())
    trial.step()
    while trial.step():
        pass
    trial.check_logits()
    _check_admission(trial)
    _check_end_of_sequence(trial)


def _check_windows(device: torch.device | str) -> None:
    """Layers with a window beside others, soft-capped logits, a prompt longer than a step and than the window."""
    trial = _Trial(["sliding_attention", "full_attention"], 0.5, device)
    trial.add("long", list(range(20, 38)), RequestSlot(0, 1))
    trial.add("short", [5, 6, 7], RequestSlot())
    trial.step()
    trial.check_called()
    while trial.step():
        pass
    trial.check_logits()
    windows = {access.window for access in trial.accesses}
    _expect(windows == {_WINDOW, None}, f"attention is told the windows {windows} of a model with one of {_WINDOW}")


def _check_admission(trial: _Trial) -> None:
    """A scheduler that lets nobody in does so again after a request was cancelled."""
    batch = trial.batch
    trial.add("running", [1, 2, 3], RequestSlot())
    trial.step()
    batch.scheduler.block_new_requests = True
    trial.add("blocked", [4, 5, 6], RequestSlot())
    _expect("blocked" not in trial.step(), "block_new_requests blocks nobody")
    batch.cancel("running")
    _expect("blocked" in trial.step(), "a cancelled request leaves others blocked")
    batch.cancel("blocked")
    _expect(not batch.prepare(), "a cancelled request still runs")


def _check_end_of_sequence(trial: _Trial) -> None:
    """Processors that keep an answer from ending know which ids would end it."""
    settings = GenerationConfig(min_new_tokens=2)
    processors = logits_processors(trial.model, settings, 3, [_FORCED], trial.device)
    scores: Any = torch.zeros(1, _VOCABULARY, device=trial.device)
    ids: Any = torch.zeros(1, 3, dtype=torch.int64, device=trial.device)
    _expect(bool(processors(ids, scores)[0, _FORCED] < 0), "min_new_tokens does not know the end-of-sequence ids")


class _Reversed(ExpertScheduler):
    """A step's requests the other way round: those whose prompt goes on in the next step come first."""

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        batch = super().schedule_batch(token_budget, cache_budget)
        self.step.reverse()
        return batch


class _Forced:
    """A logits processor that leaves one token."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([_FORCED], device=scores.device), 0.0)


class _Trial:
    """A tiny random model in a batch, and everything that was seen of it."""

    def __init__(self, layers: list[str], softcap: float | None, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.model = _tiny_model(layers, softcap, self.device)
        self.sampler = RequestSampler()
        self.sampler.observe = self._observe
        self.accesses: list[CacheAccess] = []
        self.prompts: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.rows: dict[str, list[Tensor]] = {}
        plan = plan_cache(self.model.config, torch.float32, 2**18, max_batch_tokens=_STEP, page_size=_PAGE)
        self.batch = PagedBatch(
            self.model,
            page_size=plan.page_size,
            blocks=plan.blocks,
            max_batch_tokens=_STEP,
            scheduler=_Reversed,
            sampler=self.sampler,
            attention=PAGED,
            plan_attention=self._plan,
        )
        plan.check(self.batch.nbytes)
        size = cache_geometry(self.model.config, torch.float32, _PAGE)
        sector_bytes, blocks = self.batch.sectors
        _expect(
            (sector_bytes, blocks) == (size.sector_bytes, size.blocks_per_sector),
            f"its cache has sectors of {sector_bytes} bytes and {blocks} blocks, expected were {size.sector_bytes} "
            f"bytes and {size.blocks_per_sector} blocks",
        )
        self.called: set[str] = set()
        self.replaced = self.batch.watch(self.called)

    def _observe(self, ids: list[str], scores: Tensor) -> None:
        step = [entry.state.request_id for entry in self.batch.scheduler.step if entry.has_new_token]
        _expect(ids == step, "rows of logits are not in the order of the requests")
        for row, request_id in enumerate(ids):
            self.rows[request_id].append(scores[row].clone())

    def _plan(self, access: CacheAccess) -> AttentionPlan:
        self.accesses.append(access)
        return plan_attention(access)

    def add(self, request_id: str, prompt: list[int], slot: RequestSlot, *, forced: bool = False) -> None:
        processors = LogitsProcessorList([_Forced()] if forced else [])
        self.batch.scheduler.slots[request_id] = slot
        self.sampler.states[request_id] = SamplingState(processors, _VOCABULARY)
        self.prompts[request_id], self.tokens[request_id], self.rows[request_id] = prompt, [], []
        self.batch.add(request_id, prompt, 4, ())

    def step(self) -> dict[str, int]:
        """One step; how many tokens each of its requests had, nothing where no request is left."""
        if not self.batch.prepare():
            return {}
        packed: list[Tensor] = []
        embeddings = self.model.get_input_embeddings()
        hook = embeddings.register_forward_pre_hook(lambda module, inputs: packed.append(inputs[0]))
        self.batch.run()
        hook.remove()
        counts, wanted = {}, []
        for entry in self.batch.scheduler.step:
            name, end = entry.state.request_id, entry.state.position_offset
            counts[name] = entry.query_length
            wanted += (self.prompts[name] + self.tokens[name])[end - entry.query_length : end]
        _expect(packed[0].tolist() == [wanted], "a step's tokens are not in the order of its requests")
        for new in self.batch.update():
            self.tokens[new.request_id].append(new.token)
        return counts

    def check_called(self) -> None:
        """After a step: whether every function that was replaced has been called."""
        missing = self.replaced - self.called
        _expect(not missing, f"it does not call {', '.join(sorted(missing))} any more")

    def check_logits(self) -> None:
        """Every row against a plain forward pass of its own request, and every token against its row."""
        for access in self.accesses:
            _expect(access.key_counts.tolist() == access.keys, "requests have another number of keys than expected")
        with switched_attention(self.model, "eager"):
            for name, tokens in self.tokens.items():
                prompt, seen = self.prompts[name], self.rows[name]
                _expect(len(tokens) == len(seen) == 4, f"{len(tokens)} tokens came of 4, of {len(seen)} rows of logits")
                rows, ids = torch.stack(seen), torch.tensor([prompt + tokens], device=self.device)
                expected = self.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                apart = float((rows - expected).abs().max() / expected.abs().max())
                _expect(apart < 1e-3, f"logits of a packed step are {apart:.2g} off those of a plain forward pass")
                chosen = [_FORCED] * 4 if self.sampler.states[name].processors else rows.argmax(dim=1).tolist()
                _expect(tokens == chosen, "tokens are not those that the sampler chose")


def _tiny_model(layers: list[str], softcap: float | None, device: torch.device) -> Any:
    """Two layers whose every parameter counts, the same each time."""
    config = Gemma2Config(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=len(layers),
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
        max_position_embeddings=64,
        sliding_window=_WINDOW,
        layer_types=layers,
        attn_logit_softcapping=softcap,
        final_logit_softcapping=None,
    )
    config._attn_implementation = "eager"
    model: Any = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    model.to(device, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        spread = 1.5 / parameter.shape[-1] ** 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model
