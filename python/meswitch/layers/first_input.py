"""The first input of a module, by which the axis that tokens lie along is known in every later one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class FirstInput:
    """The shape of what a module reads when it runs first, noted by a hook that then removes itself.

    An engine runs one token before anything else. A later input of more tokens is larger along their axis alone,
    whatever number of heads there is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.shape: tuple[int, ...] | None = None
        self._hook = module.register_forward_pre_hook(self._note)

    def _note(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._hook.remove()
        if args and isinstance(args[0], Tensor):
            self.shape = tuple(args[0].shape)

    def other_axes(self, x: Tensor) -> set[int]:
        """The axes along which `x` is of another size; none if nothing comparable has run before."""
        if self.shape is None or len(self.shape) != x.dim():
            return set()
        return {axis for axis, (first, now) in enumerate(zip(self.shape, x.shape, strict=True)) if first != now}
