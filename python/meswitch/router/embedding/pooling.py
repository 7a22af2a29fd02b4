"""The former place of `router.base.embed`, which the engine still imports from here."""

from meswitch.router.base import embed

__all__ = ["embed"]
