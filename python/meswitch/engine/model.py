"""What is fixed once the base is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from meswitch.batching.sampler import logits_processors
from meswitch.engine.worker import Worker


@dataclass(frozen=True)
class ServedModel:
    """Facts about the loaded base; immutable, so that any thread may read them.

    `vocabulary`: token ids that it reads; `outputs`: ids that it can answer with. `kv_tokens`: the most tokens that one
    request may have in the KV cache of `kv_bytes`. `logits_processors(config, prompt_tokens, eos)`: what a generation
    config does to logits, as transformers builds it; with `device=` for logits elsewhere than the model's.
    """

    folder: Path
    text_config: Any
    vocabulary: int
    outputs: int
    kv_tokens: int
    kv_bytes: int
    logits_processors: Callable[..., LogitsProcessorList]

    @classmethod
    def of(cls, worker: Worker) -> ServedModel:
        """The facts about the model of a worker that is ready."""

        own = worker.settings.device

        def processors(
            config: GenerationConfig, prompt_tokens: int, eos: set[int], *, device: torch.device | str = own
        ) -> LogitsProcessorList:
            return logits_processors(worker.model, config, prompt_tokens, eos, device)

        return cls(
            folder=worker.settings.base,
            text_config=worker.text_config,
            vocabulary=worker.layers.vocabulary,
            outputs=worker.layers.outputs,
            kv_tokens=worker.kv_tokens,
            kv_bytes=worker.plan.nbytes,
            logits_processors=processors,
        )
