"""Arithmetic that gives a row the same bits whatever other rows are computed with it.

torch chooses how to multiply by the number of rows, and how to compute a function by where an element lies: the last
elements of a thread's share are computed one by one, with another exponential. Inside of `BatchInvariance` every
product is made of blocks of equally many rows, and every function is computed in whole vectors by one thread.

Sums along a row (norms, softmax) need nothing: torch makes each row's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

BLOCK_ROWS = 8
"""Rows of a block: as quick as any number for eight requests; one request pays for eight, a prefill reads weights more
often."""

_VECTOR = 64  # elements: a multiple of what every instruction set takes at a time
_SHARE = 1 << 14  # elements that torch leaves to one thread
_FUNCTIONS = "cos elu erf exp expm1 gelu log log1p logsigmoid mish selu sigmoid silu sin softplus tanh".split()


class BatchInvariance(TorchFunctionMode):
    """A context in which rows do not depend on each other.

    It changes products of rows with a matrix and functions of single elements; attention has blocks of its own.
    """

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        invariant = _INVARIANT.get(function, function)
        return invariant(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x · weightᵀ + bias`, a row at a time as in any other batch; `x [..., in_features]`.

    >>> x, weight = torch.randn(3, 4), torch.randn(5, 4)
    >>> torch.equal(linear(x, weight)[:1], linear(x[:1], weight))
    True
    """
    return _by_blocks(x, lambda block: F.linear(block, weight, bias))


def _by_blocks(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return product(x)
    padded = rows.new_zeros(-(-len(rows) // BLOCK_ROWS) * BLOCK_ROWS, rows.shape[1])
    padded[: len(rows)] = rows  # a copy also of whole blocks: products may depend on where in memory a row begins
    y = torch.cat([product(block) for block in padded.split(BLOCK_ROWS)])[: len(rows)]
    return y.view(*x.shape[:-1], y.shape[1])


def _matmul(x: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or other.dim() != 2 or x.dim() < 2:
        return torch.matmul(x, other, **kwargs)
    return _by_blocks(x, lambda block: block @ other)


def _addmm(bias: Tensor, x: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    if kwargs or bias.dim() != 1:
        return torch.addmm(bias, x, other, **kwargs)
    return _by_blocks(x, lambda block: torch.addmm(bias, block, other))


def _in_whole_vectors(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def invariant(x: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel() or "out" in kwargs:
            return function(x, *args, **kwargs)
        elements = F.pad(x.reshape(-1), (0, -x.numel() % _VECTOR))
        shares = [function(share, *args, **kwargs) for share in elements.split(_SHARE)]
        return torch.cat(shares)[: x.numel()].view(x.shape)

    return invariant


_INVARIANT: dict[Any, Callable[..., Tensor]] = {
    F.linear: linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **{
        function: _in_whole_vectors(function)
        for name in _FUNCTIONS
        for owner in (torch, Tensor, F)
        if (function := getattr(owner, name, None)) is not None
    },
}
