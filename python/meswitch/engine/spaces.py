"""The spaces that some tokenizers leave out before punctuation, while text still grows."""

from __future__ import annotations

_REWRITES = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""What transformers replaces, in this order, where a tokenizer has `clean_up_tokenization_spaces`."""

_LETTERS = frozenset("".join(before for before, _ in _REWRITES))
_REACH = max(len(before) for before, _ in _REWRITES) - 1


def clean_spaces(text: str) -> str:
    """`text` as transformers cleans it.

    >>> clean_spaces("I do n't know , said she .")
    "I don't know, said she."
    """
    for before, after in _REWRITES:
        text = text.replace(before, after)
    return text


class SpaceCleaner:
    """Cleans text that comes in pieces: the results joined are the whole text cleaned.

    Text is held back while what follows may still rewrite it. A cut is safe where no rewrite can reach across: after a
    character that none of them has, or after so many that are not a space that one beginning before them ends there.
    """

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """The text that the next piece makes certain, cleaned."""
        seen = len(self._held)
        self._held += text
        for cut in range(len(self._held), seen, -1):
            letter, before = self._held[cut - 1], self._held[max(cut - _REACH, 0) : cut]
            if letter not in _LETTERS or (len(before) == _REACH and " " not in before):
                certain, self._held = self._held[:cut], self._held[cut:]
                return clean_spaces(certain)
        return ""

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return clean_spaces(held)
