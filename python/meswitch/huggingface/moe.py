"""MoE experts in transformers' interface, one after another, so that what each of them reads can be observed.

    hidden [T, H] ── the rows that a gate sends to MoE expert e ── gate and up [n, 2I] ── activation ── down [n, H]
                                                                    └ observer               observer ┘

transformers runs all MoE experts of a block in two grouped products of its own; no module sees the rows of one. While a
module is observed it computes the same by MoE expert, with its own stacks, gating function, biases and norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

Observer: TypeAlias = Callable[[str, int, Tensor, Tensor], None]
"""Gets each product with a matrix of a MoE expert: the stack's name in its module, the MoE expert's number, the rows
that are routed to it `[n, in_features]`, n > 0, and their products `[n, out_features]`."""

_FLAGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def input_stack(module: nn.Module) -> str | None:
    """The stack of a module of MoE experts that reads the block's input; `None` for any other module.

    A module counts if transformers' experts interface (`use_experts_implementation`) runs it.
    """
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return None
    name = "gate_up_proj" if module.has_gate else "up_proj"
    stacks = (module._parameters.get(stack) for stack in (name, "down_proj"))
    return name if all(stack is not None and stack.dim() == 3 for stack in stacks) else None


class ObservedExperts:
    """Lets a module of MoE experts compute by MoE expert, and calls `observer` after each product, until `remove`.

    `module`: one for which `input_stack` names a stack. Outputs are the module's own up to rounding, and gradients
    reach its input and stacks. Calls on the meta device, which route nothing, go to the module as it was.
    """

    def __init__(self, module: Any, observer: Observer) -> None:
        self._module, self._observer, self._own_forward = module, observer, module.forward
        self._input_stack = input_stack(module) or ""
        module.forward = self._forward

    def remove(self) -> None:
        """The module computes as before."""
        del self._module.forward

    def _forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hidden_states.is_meta:
            own: Tensor = self._own_forward(hidden_states, top_k_index, top_k_weights)
            return own
        module, total = self._module, None
        for moe_expert in top_k_index.unique().tolist():
            if moe_expert >= len(module.down_proj):
                continue  # a row that only fills up a step
            rows, choices = (top_k_index == moe_expert).nonzero(as_tuple=True)
            x = self._product(self._input_stack, moe_expert, hidden_states[rows])
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
            y = self._product("down_proj", moe_expert, x)
            y = module.post_expert_norm(y) if module.has_post_expert_norm else y
            y = y * top_k_weights[rows, choices, None]
            total = y.new_zeros(len(hidden_states), y.shape[-1]) if total is None else total
            total = total.index_add(0, rows, y)
        return hidden_states.new_zeros(hidden_states.shape) if total is None else total.to(hidden_states.dtype)

    def _product(self, stack: str, moe_expert: int, x: Tensor) -> Tensor:
        weight = getattr(self._module, stack)[moe_expert]
        bias = getattr(self._module, f"{stack}_bias")[moe_expert] if self._module.has_bias else None
        y = nn.functional.linear(x, weight.T if self._module.is_transposed else weight, bias)
        self._observer(stack, moe_expert, x, y)
        return y
