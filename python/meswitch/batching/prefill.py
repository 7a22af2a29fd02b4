"""How much of a prompt a step takes while other requests decode."""

from __future__ import annotations

LEAST_TOKENS = 16
LONGEST_STEP = 3.0
"""A step that also reads prompts takes at most about so many times as long as one that only decodes."""


class PrefillChunk:
    """Tokens of prompts for a step that others decode in: as many as keep their texts running.

    A prompt of hundreds of tokens is compute that a decode step, which waits for memory, has not. How much of it a step
    bears depends on model and machine, so it is learned: halved after a step that took too long, doubled after one that
    was far from it. Without anyone decoding, a step takes all it can.
    """

    def __init__(self, most: int) -> None:
        self.most = self.tokens = most
        self._decode_seconds: float | None = None

    def learn(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Notes a step of `decoding` requests with one token each, and `prompt_tokens` of others."""
        if not decoding:
            return
        if not prompt_tokens:
            before = self._decode_seconds or seconds
            self._decode_seconds = 0.8 * before + 0.2 * min(seconds, 4 * before)
        elif self._decode_seconds is not None and prompt_tokens > self.tokens // 2:  # others say nothing of the size
            if seconds > LONGEST_STEP * self._decode_seconds:
                self.tokens = max(self.tokens // 2, min(LEAST_TOKENS, self.most))
            elif seconds < LONGEST_STEP / 2 * self._decode_seconds:
                self.tokens = min(2 * self.tokens, self.most)
