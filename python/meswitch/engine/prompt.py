"""Prompts to token ids: text, chats, or ids as they are, checked against the model's vocabulary and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from meswitch.engine.model import ServedModel
from meswitch.errors import RequestError
from meswitch.experts.catalogue import Expert
from meswitch.experts.settings import ExpertSettings
from meswitch.huggingface.config import context_limit

Prompt: TypeAlias = str | Sequence[int]
Conversation: TypeAlias = Sequence[Mapping[str, Any]]


class PromptEncoder:
    """Encodes prompts on the caller's thread. Every method raises `RequestError` for what cannot be run."""

    def __init__(self, model: ServedModel, settings: ExpertSettings) -> None:
        self._model, self._settings = model, settings

    def encode(self, prompt: Any, expert: Expert | None, *, chat: bool) -> list[int]:
        """The ids of a prompt, at least one, all within the expert's vocabulary."""
        if chat:
            ids = self._encode_chat(prompt, expert)
        elif isinstance(prompt, str):
            ids = self._encode_text(prompt, expert)
        else:
            ids = list(prompt)
        if not ids:
            raise RequestError("the prompt is empty and the tokenizer has no beginning-of-sequence token")
        vocabulary = self._model.vocabulary if expert is None else expert.vocabulary
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise RequestError(f"expected token ids from 0 to {vocabulary - 1}, found {token!r}")
        return ids

    def limit(self, prompt_tokens: int, expert: Expert | None, wanted: int) -> int:
        """How many tokens may follow a prompt of `prompt_tokens`, at most `wanted`."""
        context, reason = context_limit(self._settings.config(expert))
        kv_tokens = self._model.kv_tokens
        for most, why, hint in (
            (context, reason, "shorten the prompt"),
            (kv_tokens, f"kv_budget ({self._model.kv_bytes} bytes)", "shorten the prompt or raise kv_budget"),
        ):
            if prompt_tokens >= most:
                raise RequestError(
                    f"the prompt is too long: expected less than {most} tokens ({why}), found {prompt_tokens}",
                    hint=hint,
                )
        return min(wanted, context - prompt_tokens, kv_tokens - prompt_tokens)

    def stops(self, texts: list[str], expert: Expert | None) -> tuple[list[str], set[int]]:
        """The stop strings, and the end-of-sequence ids.

        A stop string that is a special token, which text never shows, becomes an id instead.
        """
        eos = self._settings.eos_ids(expert)
        if not texts:
            return [], eos
        tokenizer = self._settings.required_tokenizer(expert)
        special = set(getattr(tokenizer, "all_special_tokens", ()))
        eos |= {int(tokenizer.convert_tokens_to_ids(text)) for text in texts if text in special}
        return [text for text in texts if text not in special], eos

    def routing_text(self, prompt: Any) -> str:
        """What a router gets to read: the text, the last user message of a chat, or decoded ids."""
        if isinstance(prompt, str):
            return prompt
        if prompt and isinstance(prompt[0], Mapping):
            messages = [str(message.get("content", "")) for message in prompt if message.get("role") == "user"]
            return messages[-1] if messages else ""
        return str(self._settings.required_tokenizer(None).decode(list(prompt)))

    def _encode_text(self, prompt: str, expert: Expert | None) -> list[int]:
        tokenizer = self._settings.required_tokenizer(expert)
        with self._settings.lock:
            ids = list(tokenizer(prompt)["input_ids"])
        if not ids and tokenizer.bos_token_id is not None:
            ids = [int(tokenizer.bos_token_id)]
        return ids

    def _encode_chat(self, messages: Any, expert: Expert | None) -> list[int]:
        if not messages or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
            raise RequestError(
                'expected messages such as {"role": "user", "content": "..."}, found ' + repr(messages)[:80]
            )
        tokenizer = self._settings.required_tokenizer(expert)
        if not getattr(tokenizer, "chat_template", None):
            name = "the base" if expert is None else f"expert {expert.name!r}"
            raise RequestError(f"{name} has no chat template", hint="use generate with a prompt of your own")
        with self._settings.lock:
            try:
                encoded = tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )
            except Exception as error:  # a template is a program and may raise anything
                raise RequestError(f"the chat template refuses these messages: {error}") from error
        return list(encoded["input_ids"])
