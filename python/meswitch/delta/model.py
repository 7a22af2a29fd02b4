"""An expert as an ordinary transformers model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from meswitch.delta.directory import Delta
from meswitch.delta.restoration import rebuild
from meswitch.errors import FormatError
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.models import load_weights, skeleton
from meswitch.site import Site


class _LazyWeight:
    """A site's weight, rebuilt when transformers reads it (by `[...]`, as from a safetensors slice)."""

    def __init__(self, base: Checkpoint | None, site: Site) -> None:
        self._base, self._site = base, site

    def __getitem__(self, _: object) -> Tensor:
        # A copy: the model must outlive the mapped files.
        return rebuild(self._site, self._base, rounded=False).to(torch.float32, copy=True)


def expert_model(base: Checkpoint | None, delta: Delta, sites: Mapping[str, Site] | None = None) -> Any:
    """The expert in float32, base plus delta as exact arithmetic serves it, built one weight at a time.

    `base` is `None` for a quantized model. `sites` replace the delta's. Raises `FormatError` if weights of the model
    are missing.
    """
    sites = delta.load() if sites is None else sites
    state = {name: _LazyWeight(base, site) for name, site in sites.items()}
    model, missing = load_weights(skeleton(delta.path), state, torch.float32)
    if missing:
        raise FormatError(
            f"expected every weight of the model, found {len(missing)} missing: {missing[0]}: {delta.path}"
        )
    return model
