"""How the functions of transformers that `bridge` uses are called, compared with what is installed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from transformers import DeepseekV3Config, Gemma2Config, Gemma3nTextConfig, PreTrainedModel

from meswitch.batching.bridge import INTERNALS, changed


@dataclass(frozen=True)
class Call:
    """A call with `positional` arguments (`self` counts) and `keywords`.

    `replaced`: ours stands in for the function, so it must take exactly these.
    """

    positional: int
    keywords: str = ""
    replaced: bool = False


_BATCHING = (
    "scheduler_type page_size num_blocks max_batch_tokens max_requests_per_batch max_memory_percent "
    "use_async_batching use_cuda_graph auto_switch_to_flash seed"
)
CALLS = {
    "FIFOScheduler.__init__": Call(4, replaced=True),
    "FIFOScheduler.schedule_batch": Call(3, replaced=True),
    "FIFOScheduler.clear_cancelled_requests": Call(1, replaced=True),
    "FIFOScheduler.set_request_cancellation": Call(2),
    "FIFOScheduler.add_waiting_request": Call(2),
    "PagedAttentionCache.search_prefix_match": Call(3, replaced=True),
    "FullAttentionCacheAllocator.mark_complete_blocks": Call(4, replaced=True),
    "FullAttentionCacheAllocator.get_seqlen_k": Call(3),
    "FullAttentionCacheAllocator.update": Call(6),
    "SlidingAttentionCacheAllocator.mark_complete_blocks": Call(4, replaced=True),
    "SlidingAttentionCacheAllocator.get_seqlen_k": Call(3),
    "SlidingAttentionCacheAllocator.update": Call(6),
    "ContinuousBatchingLogitsProcessor.fill_defaults": Call(2, replaced=True),
    "ContinuousBatchingLogitsProcessor.prepare_tensor_args": Call(2, replaced=True),
    "ContinuousBatchingLogitsProcessor.__call__": Call(3, replaced=True),
    "ContinuousBatchingLogitsProcessorList.__init__": Call(2),
    "ContinuousBatchProcessor.prepare_next_batch": Call(1),
    "ContinuousBatchProcessor._generation_step": Call(2),
    "ContinuousBatchProcessor.update_batch": Call(1),
    "ContinuousBatchingIOs.get_model_kwargs": Call(1, "use_padding", replaced=True),
    "ContinuousBatchingManager._create_batch_processor": Call(1),
    "OutputRouter.deliver": Call(2, replaced=True),
    "OutputRouter.deliver_batch": Call(2, replaced=True),
    "OutputRouter.fail_and_deliver": Call(3, replaced=True),
    "RequestState.__init__": Call(1, "request_id initial_tokens max_new_tokens eos_token_id"),
    "ContinuousBatchingConfig.__init__": Call(1, _BATCHING),
    "PreTrainedModel.set_attn_implementation": Call(2),
    "GenerationMixin.init_continuous_batching": Call(1, "generation_config continuous_batching_config"),
    "GenerationMixin._get_logits_processor": Call(2, "input_ids_seq_length device"),
    "group_layers_by_attn_type": Call(1),
    "find_head_dim": Call(1),
    "find_num_key_value_heads": Call(1),
    "infer_max_single_request_tokens": Call(1),
}
# Fields that decide whether a model can be served; the config classes stand for all that have such a field.
FIELDS = (
    (PreTrainedModel, "_is_stateful"),
    (PreTrainedModel, "_supports_attention_backend"),
    (Gemma2Config, "attn_logit_softcapping"),
    (Gemma3nTextConfig, "num_kv_shared_layers"),
    (DeepseekV3Config, "kv_lora_rank"),
)


def check_signatures() -> None:
    """Raises `TransformersVersionError` where a function or a field that is used is gone, or is called in another
    way."""
    internals: dict[str, Any] = {internal.__name__: internal for internal in INTERNALS}
    for where, call in CALLS.items():
        owner, _, name = where.partition(".")
        function = getattr(internals.get(owner), name, None) if name else internals[owner]
        if function is None:
            raise changed(f"there is no {where}")
        signature, keywords = inspect.signature(function), call.keywords.split()
        try:
            signature.bind(*[None] * call.positional, **dict.fromkeys(keywords))
        except TypeError as error:
            raise changed(f"{where}{signature} is not called as before: {error}") from error
        if call.replaced and len(signature.parameters) != call.positional + len(keywords):
            raise changed(f"{where}{signature} takes more than what stands in for it")
    for holder, field in FIELDS:
        if not hasattr(holder, field):
            raise changed(f"{holder.__name__} has no {field}")
