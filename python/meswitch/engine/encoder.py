"""Prompts to token ids under a model's own tokenizer, within its vocabulary and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meswitch.engine.model import ServedModel
from meswitch.engine.prompt import checked_ids, routing_text
from meswitch.errors import RequestError
from meswitch.experts.catalogue import Expert
from meswitch.experts.settings import ModelSettings
from meswitch.huggingface.config import context_limit

_MOST_IDS = 2**31  # what a tokenizer can be asked about


class PromptEncoder:
    """Encodes prompts on the caller's thread. `base`: the base's settings.

    Every method raises `RequestError` for what cannot be run; `None` in an expert's place is the base.
    """

    def __init__(self, model: ServedModel, base: ModelSettings) -> None:
        self._model, self._base = model, base

    def settings(self, expert: Expert | None) -> ModelSettings:
        """What an expert's requests run under."""
        return self._base if expert is None or expert.settings is None else expert.settings

    def encode(self, prompt: str | Sequence[int] | Sequence[Mapping[str, Any]], expert: Expert | None) -> list[int]:
        """The ids of text, of a conversation, or as they are: at least one, all within the expert's vocabulary."""
        settings = self.settings(expert)
        most = self._most(expert)[0][0]
        if isinstance(prompt, str):
            tokenizer = settings.required_tokenizer
            ids = tokenizer.encode(prompt, most=most)
            if not ids and tokenizer.bos_id is not None:
                ids = [tokenizer.bos_id]
        elif prompt and isinstance(prompt[0], Mapping):
            tokenizer = settings.required_tokenizer
            if not getattr(tokenizer.inner, "chat_template", None):
                raise RequestError(
                    f"{settings.name} has no chat template", hint="use generate with a prompt of your own"
                )
            ids = tokenizer.encode_chat(prompt, most=most)  # type: ignore[arg-type]
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        return checked_ids(ids, self._model.vocabulary if expert is None else expert.vocabulary)

    def limit(self, prompt_tokens: int, expert: Expert | None, wanted: int | None) -> int:
        """How many tokens may follow a prompt of `prompt_tokens`.

        At most `wanted`, else what the model's own generation config says, else 256.
        """
        most = self._most(expert)
        own = self.settings(expert).generation
        if wanted is None:
            wanted = own.max_new_tokens or 256
            if own.max_new_tokens is None and own.max_length is not None:
                most.append((own.max_length, "max_length of its generation config", "pass max_new_tokens"))
                wanted = own.max_length
        for tokens, why, hint in sorted(most):
            if prompt_tokens >= tokens:
                raise RequestError(
                    f"the prompt is too long: expected less than {tokens} tokens ({why}), found {prompt_tokens}",
                    hint=hint,
                )
        return min(wanted, *(tokens - prompt_tokens for tokens, _, _ in most))

    def stops(self, wanted: Sequence[str], expert: Expert | None) -> tuple[list[str], set[int]]:
        """The stop strings, with those of the model's own generation config, and the end-of-sequence ids.

        A stop string that is a special token, which text does not show, is also an end-of-sequence id.
        """
        settings = self.settings(expert)
        eos, own = settings.eos_ids, settings.generation.stop_strings
        texts = [*wanted, *([own] if isinstance(own, str) else own or ())]
        if texts:
            eos |= {token for token, text in settings.required_tokenizer.hidden.items() if text in texts}
        return texts, eos

    def _most(self, expert: Expert | None) -> list[tuple[int, str, str]]:
        """(tokens of prompt and answer together, why, what helps), the least first."""
        context, reason = context_limit(self.settings(expert).config)
        budget = f"kv_budget ({self._model.kv_bytes} bytes)"
        return sorted(
            [
                (context, reason, "shorten the prompt"),
                (self._model.kv_tokens, budget, "shorten the prompt or raise kv_budget"),
            ]
        )

    def routing_text(self, prompt: str | list[int] | list[Mapping[str, Any]]) -> str:
        """What a router gets to read. Ids are decoded by the base's tokenizer, since no expert has them yet."""
        text = routing_text(prompt)
        if not isinstance(text, str):
            return self._base.required_tokenizer.decode(checked_ids(text, _MOST_IDS))
        tokenizer = self._base.tokenizer
        if tokenizer is not None:  # a router encodes it all, though it reads no more than the ends
            tokenizer.check(text, most=self._model.kv_tokens)
        return text
