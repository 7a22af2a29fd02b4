"""Linear layers whose backward products are in bfloat16, while the forward product stays in float32.

What a delta misses is smaller than a step of bfloat16, so predictions must be compared in float32. Gradients are sums
over many tokens, for scales that many weights share: rounding them hardly changes their direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from meswitch.kernels.processor import multiplies_bfloat16


class Bfloat16Gradients(TorchFunctionMode):
    """A context in which `F.linear` of float32 tensors saves its inputs and multiplies gradients in bfloat16.

    It changes nothing on a processor without bfloat16 products, or where gradients are off.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = multiplies_bfloat16()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        replaced = self._enabled and function is F.linear and torch.is_grad_enabled()
        return (_Linear.apply if replaced else function)(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """`F.linear(x, weight, bias)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x.bfloat16(), weight.bfloat16())
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needed, gradient = ctx.needs_input_grad, gradients[0]
        rounded = gradient.bfloat16().flatten(0, -2)
        return (
            (rounded @ weight).view(x.shape).float() if needed[0] else None,
            (rounded.T @ x.flatten(0, -2)).float() if needed[1] else None,
            gradient.flatten(0, -2).sum(0) if len(needed) > 2 and needed[2] else None,
        )
