"""The forward of a module of MoE experts that are read when its gate has chosen them.

    hidden [T, H] ── each row once for each of its k choices, sorted by MoE expert [T·k, H]
       rows of each MoE expert ── up ──┐                ┌── down ──┐       in the order in which they are in memory
                                       └── activation ──┘          └── weighed, summed by token

Every product and every function is the one that transformers' own forward makes of these rows, so that outputs are
equal bit for bit. An index beyond the MoE experts is that of a row that only fills up a step: nothing is read for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from meswitch.moe.extents import stack_names
from meswitch.moe.resident import ResidentLayer
from meswitch.moe.store import Layer, Use


class ExactExperts:
    """Stands for the forward of a module of MoE experts; small parameters stay the module's.

    It does what `grouped_mm` does, transformers' default, or under the implementation `eager` runs the module's own
    loop over MoE experts. Raises what reading them raises, and `BudgetError` where a token's choices exceed the budget.
    """

    def __init__(self, module: Any, layer: Layer | ResidentLayer) -> None:
        self._module, self._layer = module, layer
        self._names = stack_names(module)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._layer.check_choices(top_k_index.shape[-1])
        if self._module.config._experts_implementation == "eager":
            return self._one_after_another(hidden_states, top_k_index, top_k_weights)
        choices = top_k_index.shape[-1]
        chosen, order = torch.sort(top_k_index.reshape(-1))
        own = order[: int((chosen < len(self._layer)).sum())]
        y = self._outputs(hidden_states[own // choices], chosen[: len(own)])
        y = y * top_k_weights.reshape(-1)[own].unsqueeze(-1)
        weighed = y.new_zeros(len(order), y.shape[-1])
        weighed[own] = y
        return weighed.view(-1, choices, y.shape[-1]).sum(dim=1).to(hidden_states.dtype)

    def _outputs(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the MoE experts `chosen [S]`, in ascending order, make of rows `x [S, H]`."""
        if not len(x):
            return x
        module = self._module
        numbers, counts = (each.tolist() for each in chosen.unique_consecutive(return_counts=True))
        with self._layer.visit(numbers) as run:
            x = self._products(run, x, numbers, counts, self._names[0])
            # Of all rows at once: the last bits of a function may depend on where an element lies.
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
            x = self._products(run, x, numbers, counts, self._names[1])
        return module.post_expert_norm(x) if module.has_post_expert_norm else x

    def _products(
        self, run: Callable[[Use], None], x: Tensor, numbers: list[int], counts: list[int], name: str
    ) -> Tensor:
        """Rows `x`, the first of `counts` for the first of `numbers` and so on, each with its MoE expert's matrix."""
        rows = x.split(counts)
        products = list(rows)

        def multiply(position: int, weight: Tensor) -> None:
            products[position] = self._product(rows[position], weight, name, numbers[position])

        run(multiply)
        return torch.cat(products)

    def _product(self, x: Tensor, weight: Tensor, name: str, number: int) -> Tensor:
        x = x.to(weight.dtype)
        y = torch.mm(x, weight) if self._module.is_transposed else F.linear(x, weight)
        return y.add_(getattr(self._module, f"{name}_bias")[number]) if self._module.has_bias else y

    def _one_after_another(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The module's own loop, over stacks that are read as it goes."""
        module, numbers = self._module, top_k_index.unique().tolist()
        with self._layer.in_order([number for number in numbers if number < len(self._layer)]) as stacks:
            try:
                for name, stack in zip(self._names, stacks, strict=True):
                    module.__dict__[name] = stack  # found before the parameter of that name
                y: Tensor = type(module).forward(module, hidden_states, top_k_index, top_k_weights)
            finally:
                for name in self._names:
                    module.__dict__.pop(name, None)
        return y
