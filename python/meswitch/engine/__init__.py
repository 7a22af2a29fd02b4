"""Engine: one base and many experts answer requests in one batch."""

from __future__ import annotations

from meswitch.engine.engine import Engine
from meswitch.engine.request import Answer
from meswitch.engine.stream import TextStream

__all__ = ["Answer", "Engine", "TextStream"]
