"""The forward of a module of MoE experts of which each has a low-bit copy in memory.

    a token's choices ──┬─ the heaviest few ─────────────── exact, fetched where it is not in memory
                        ├─ others that are in memory ────── exact
                        └─ others ───────────────────────── the copy

A light choice that is answered by its copy costs no read and little of the answer (HOBBIT, arXiv 2411.01433, does so by
thresholds of the gate's weights; a count serves as well and bounds the reads of a token).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from meswitch.layers.moe import MoeWrapper
from meswitch.moe.exact import ExactExperts
from meswitch.moe.store import Layer


class FallbackExperts(ExactExperts):
    """Stands for the forward of a module of MoE experts.

    `copies`: the same MoE experts, packed. `fetched`: how many of a token's choices, those of the greatest weights, are
    computed with the exact weights whatever that takes. `choices`, `copied`: choices of all tokens so far, and those of
    them that copies answered.
    Raises what reading raises, and `BudgetError` where the fetched choices of a token exceed the budget.
    """

    def __init__(self, module: Any, layer: Layer, copies: MoeWrapper, fetched: int) -> None:
        super().__init__(module, layer)
        self._store_layer, self._copies, self._fetched = layer, copies, fetched
        self.choices = self.copied = 0

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, choices = top_k_index.shape
        fetched = min(self._fetched, choices)
        self._layer.check_choices(fetched)
        real = top_k_index < len(self._layer)
        heavy = torch.zeros_like(real).scatter_(1, top_k_weights.topk(fetched, dim=1).indices, True) & real
        exact = self._store_layer.in_memory()
        exact[top_k_index[heavy]] = True  # for every token that chose one of them
        chosen = top_k_index.reshape(-1)
        by_expert = chosen[order := torch.argsort(chosen)].clamp(max=len(self._layer) - 1)
        is_real = real.reshape(-1)[order]
        own, others = order[exact[by_expert] & is_real], order[~exact[by_expert] & is_real]
        self.choices += len(own) + len(others)
        self.copied += len(others)
        y = hidden_states.new_zeros(len(order), hidden_states.shape[-1])
        y[own] = self._outputs(hidden_states[own // choices], chosen[own])
        y[others] = self._copies.outputs(hidden_states[others // choices], chosen[others])
        y = y * top_k_weights.reshape(-1, 1)
        return y.view(tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)
