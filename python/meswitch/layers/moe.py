"""MoE experts whose weights the base keeps packed: every token's products with the MoE experts that its gate chose.

hidden [T, H] ── each row once for each of its k choices [T·k, H] ──┬─ gate ─┐
                                                                   └─ up ───┴─ activation ── down ── weighed, summed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.kernels.protocol import DeltaLinear, Kernels
from meswitch.kernels.rows import BASE_SLOT, Rows
from meswitch.site import DeltaSite

STACKS = ("gate_up_proj", "down_proj")
"""The parameters of a module of MoE experts, each `[MoE experts, out_features, in_features]`."""


def can_stay_packed(module: nn.Module) -> bool:
    """Whether a module of MoE experts computes what `PackedExperts` does: transformers' interface in its plain form."""
    plain = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    plain["has_post_expert_norm"] = False
    flags = all(getattr(module, flag, None) == value for flag, value in plain.items())
    return flags and hasattr(module, "_apply_gate") and set(module._parameters) == set(STACKS)


class PackedExperts:
    """Stands for the forward of a module of MoE experts.

    `stacks`: for each of `STACKS` and each MoE expert, the sites whose rows lie one below another in it.
    """

    def __init__(self, module: Any, kernels: Kernels, stacks: dict[str, list[list[DeltaSite]]]) -> None:
        self._module, self._count = module, len(stacks[STACKS[0]])
        self._gate_up, self._down = (_tables(module, kernels, stacks[name]) for name in STACKS)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        choices = top_k_index.shape[-1]
        # An index beyond the MoE experts is that of a row that only fills up a step.
        chosen = top_k_index.masked_fill(top_k_index >= self._count, BASE_SLOT)
        rows = Rows.of_tensor(chosen.reshape(-1))
        x = hidden_states.repeat_interleave(choices, dim=0)
        x = self._module._apply_gate(_product(self._gate_up, x, rows))
        y = _product(self._down, x, rows) * top_k_weights.reshape(-1, 1)
        return y.view(-1, choices, y.shape[-1]).sum(dim=1).to(hidden_states.dtype)


_Tables = list[tuple[slice, DeltaLinear]]


def _tables(module: nn.Module, kernels: Kernels, experts: Sequence[Sequence[DeltaSite]]) -> _Tables:
    """For each site of a MoE expert its rows in the stack, and the product with that of each MoE expert, by slot."""
    tables: _Tables = []
    start = 0
    for number, first in enumerate(experts[0]):
        table = kernels.linear(module, module.forward, first.out_features, first.in_features, many_rows=False)
        for slot, sites in enumerate(experts):
            table.set(slot, sites[number])
        tables.append((slice(start, start + first.out_features), table))
        start += first.out_features
    return tables


def _product(tables: _Tables, x: Tensor, rows: Rows) -> Tensor:
    y = torch.zeros(len(x), tables[-1][0].stop, dtype=x.dtype, device=x.device)
    for own, table in tables:
        table.add(y[:, own], x, rows)
    return y
