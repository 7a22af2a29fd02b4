"""What an expert may be called: in a folder, in a request, and as the label of a router's prompts."""

from __future__ import annotations

from meswitch.errors import ExpertNameError

BASE = "base"
"""The name of the base, where an expert's name is asked for."""

RESERVED = (BASE, "auto")


def check_name(name: object) -> str:
    """The name, if it is a safe one for an expert. Raises `ExpertNameError`.

    >>> check_name("maths-v2")
    'maths-v2'
    """
    if not isinstance(name, str) or not name:
        raise ExpertNameError(f"an expert's name is text that is not empty, found {name!r}")
    reason = None
    if name in RESERVED:
        reason = f"{name!r} is reserved"
    elif "/" in name or "\\" in name or ".." in name:
        reason = "'/', '\\' and '..' are not allowed"
    elif name.startswith("."):
        reason = "a leading '.' is not allowed"
    elif name != name.strip():
        reason = "a blank at either end is not allowed"
    elif any(not character.isprintable() for character in name):
        reason = "control characters are not allowed"
    if reason is not None:
        raise ExpertNameError(f"{reason} in an expert's name, found {name!r}", hint="rename the expert")
    return name
