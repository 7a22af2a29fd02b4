"""What is fixed once the base is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LogitsProcessorList

from meswitch.engine.worker import Worker


@dataclass(frozen=True)
class ServedModel:
    """Facts about the loaded base; immutable, so that any thread may read them.

    `vocabulary`: token ids that it reads; `outputs`: ids that it can answer with. `kv_tokens`: the most tokens that one
    request may have in the KV cache of `kv_bytes`. `logits_processors(config, prompt_tokens)`: what a generation config
    does to logits, as transformers builds it.
    """

    folder: Path
    text_config: Any
    vocabulary: int
    outputs: int
    kv_tokens: int
    kv_bytes: int
    logits_processors: Callable[[GenerationConfig, int], LogitsProcessorList]

    @classmethod
    def of(cls, worker: Worker) -> ServedModel:
        """The facts about the model of a worker that is ready."""

        def logits_processors(config: GenerationConfig, prompt_tokens: int) -> LogitsProcessorList:
            processors: LogitsProcessorList = worker.model._get_logits_processor(
                config, input_ids_seq_length=prompt_tokens, device="cpu"
            )
            return processors

        return cls(
            folder=worker.settings.base,
            text_config=worker.text_config,
            vocabulary=worker.layers.vocabulary,
            outputs=worker.layers.outputs,
            kv_tokens=worker.kv_tokens,
            kv_bytes=worker.plan.nbytes,
            logits_processors=logits_processors,
        )
