"""What wrappers of all kinds have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from meswitch.errors import ArchitectureError, UnsupportedModelError
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.rows import Rows
from meswitch.layers.step import Step
from meswitch.site import Site


class Wrapper:
    """What experts changed in one module of the base.

    `check` before `set`: it raises where a site cannot be served. `attach` puts the wrapper in the module's place,
    `detach` gives the module back as it was. A *leaf* is the name of one of the module's own parameters.
    """

    def __init__(self, name: str, module: nn.Module, step: Step, kernels: Kernels) -> None:
        self.name, self.module, self.step, self.kernels = name, module, step, kernels
        self.slots: set[int] = set()
        self.base_forward: Any = module.forward
        self._own_forward = module.__dict__.get("forward")

    def check(self, leaf: str, site: Site) -> None:
        """Raises `ArchitectureError` or `UnsupportedModelError` where `site` cannot be served here."""

    def set(self, slot: int, leaf: str, site: Site) -> None:
        """Gives a slot its own parameter `leaf`."""
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        """The slot has the base's parameters again."""
        self.slots.discard(slot)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, every row with its own expert's parameters."""
        raise NotImplementedError

    def attach(self) -> None:
        self.module.forward = self.forward

    def detach(self) -> None:
        if self._own_forward is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self._own_forward

    def active(self, rows: Rows) -> bool:
        """Whether any row belongs to a slot that changes this module."""
        return bool(rows.tokens) and not self.slots.isdisjoint(rows.tokens)

    def run_with(self, values: Mapping[str, Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module on `x`, with these parameters."""
        parameters = self.module._parameters
        own = {leaf: parameters[leaf] for leaf in values}
        parameters.update(values)  # type: ignore[arg-type]
        try:
            return self.base_forward(x, *args, **kwargs)
        finally:
            parameters.update(own)

    def expect_rows(self, found: int, rows: Rows) -> None:
        if found != len(rows):
            raise UnsupportedModelError(
                f"{self.name}: expected a row for each of {len(rows)} tokens, found {found}",
                hint=f"{type(self.module).__name__} does not see every token of a packed step",
            )

    def shape_mismatch(self, site: Site, expected: object, found: object) -> ArchitectureError:
        return ArchitectureError(f"{site.name} ({type(self.module).__name__}): expected {expected}, found {found}")
