"""Linear modules that take the same input one after another (q, k and v; gate and up): computed in one go.

The first step of a model shows who they are. From the second on, the first of them computes the products of all, and
the others find theirs ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor

from meswitch.kernels.rows import Rows


class Follower(Protocol):
    """A module. `followers`: those that take its input after it; `ready`: of which input its product is made."""

    followers: list[Any]
    ready: tuple[Rows, Tensor, Tensor] | None


M = TypeVar("M", bound=Follower)


class SharedInput:
    """What a backend remembers of its modules; `most`: how many are computed together."""

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._last: tuple[Follower, Tensor, Rows] | None = None

    def product(self, module: M, x: Tensor, rows: Rows, multiply: Callable[[list[M]], list[Tensor]]) -> Tensor:
        """The product of `module` with `x`: `multiply` computes those of it and its followers."""
        if module.ready is not None and module.ready[0] is rows and module.ready[1] is x:
            product, module.ready = module.ready[2], None
            return product
        for other in [other for other in module.followers if other.ready is not None]:
            # It did not take its product in the last step, so it is no longer computed with this one.
            module.followers.remove(other)
            other.ready = None
        product, *others = multiply([module, *module.followers])
        for other, y in zip(module.followers, others, strict=True):
            other.ready = rows, x, y
        self._note(module, x, rows)
        return product

    def _note(self, module: Follower, x: Tensor, rows: Rows) -> None:
        """Remembers who receives the same tensor."""
        if self._last is None or self._last[1] is not x or self._last[2] is not rows:
            self._last = module, x, rows
            return
        first = self._last[0]
        if module is not first and (self._most is None or len(first.followers) + 1 < self._most):
            first.followers.append(module)
