"""Linear layers whose way back is in bfloat16: gradients bear its rounding, the way there does not.

What a delta misses is smaller than a bfloat16's step, so answers are compared in float32. Their gradients are sums of
many tokens, for scales that share many weights: rounded once more, they point where they did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class QuickGradients(TorchFunctionMode):
    """Within it `F.linear` of float32 tensors keeps and multiplies bfloat16 for its gradients, where the processor is
    made for that.
    """

    def __init__(self) -> None:
        super().__init__()
        self._here = multiplies_bfloat16()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        quick = self._here and function is F.linear and torch.is_grad_enabled()
        return (_Linear.apply if quick else function)(*args, **(kwargs or {}))


def multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16"))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x.bfloat16(), weight.bfloat16())
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted, gradient = ctx.needs_input_grad, gradients[0]
        short = gradient.bfloat16().flatten(0, -2)
        return (
            (short @ weight).view(x.shape).float() if wanted[0] else None,
            (short.T @ x.flatten(0, -2)).float() if wanted[1] else None,
            gradient.flatten(0, -2).sum(0) if len(wanted) > 2 and wanted[2] else None,
        )
