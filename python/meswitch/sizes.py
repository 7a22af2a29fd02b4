"""Parsing of sizes such as "1GiB"."""

from __future__ import annotations

import re

from meswitch.errors import RequestError

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(size: int | str | None, what: str) -> int | None:
    """A number of bytes from an integer, or from text with a unit; `None` stays `None`.

    `what` names the setting in the error. Units: B, kB, MB, GB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024).
    Raises `RequestError` for anything else, and for sizes below 1 or beyond any machine.

    >>> parse_bytes("1GiB", "kv_budget"), parse_bytes("1.5 MB", "kv_budget"), parse_bytes(4096, "kv_budget")
    (1073741824, 1500000, 4096)
    """
    if size is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    count = 0.0 if isinstance(size, bool) or match is None else float(match[1]) * _UNITS.get(match[2], 0)
    if not 1 <= count < 2**63:
        raise RequestError(
            f"{what}: expected a positive number of bytes, found {size!r}",
            hint='write bytes or text such as "1GiB"',
        )
    return int(count)
