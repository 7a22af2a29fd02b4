"""An extension of griffe: the examples of docstrings as code. Markdown would take `>>>` for a quotation."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

# Lines of an example: a prompt, and what follows it up to an empty line.
_EXAMPLE = re.compile(r"^>>> (?:.*\n?)(?:.+\n?)*", re.MULTILINE)


class Examples(Extension):
    """Puts fences around every example."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(example: re.Match[str]) -> str:
    return f"```pycon\n{example[0].rstrip()}\n```\n"
