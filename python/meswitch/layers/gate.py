"""Gates: which MoE experts a token goes to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from meswitch.kernels.protocol import Kernels
from meswitch.layers.step import Step
from meswitch.layers.wrapper import Wrapper
from meswitch.reference import restored
from meswitch.site import Site


class GateWrapper(Wrapper):
    """A gate of MoE experts, whose every output has a row for each token.

    It runs once for each fine-tune of a step, on that one's tokens and with that one's parameters: they are small, and
    what a family makes of its scores stays its own.
    """

    def __init__(
        self, name: str, module: nn.Module, step: Step, kernels: Kernels, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """`shapes`: of the base's parameters."""
        super().__init__(name, module, step, kernels)
        self._shapes = shapes
        self._values: dict[int, dict[str, Tensor]] = {}  # by slot

    def check(self, leaf: str, site: Site) -> None:
        if self._shapes.get(leaf) != tuple(site.shape):
            raise self.shape_mismatch(site, self._shapes.get(leaf), tuple(site.shape))

    def set(self, slot: int, leaf: str, site: Site) -> None:
        self.slots.add(slot)
        base: Tensor = getattr(self.module, leaf)
        self._values.setdefault(slot, {})[leaf] = restored(site, base.detach().cpu()).to(base)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self._values.pop(slot, None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = self.step.tokens
        if not self.active(rows):
            return self.base_forward(hidden_states, *args, **kwargs)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        self.expect_rows(len(x), rows)
        if rows.only_slot is not None:
            return self._of_slot(rows.only_slot, x, *args, **kwargs)
        parts = {slot: self._of_slot(slot, x[index], *args, **kwargs) for slot, index in rows.distinct.items()}
        order = torch.cat(list(rows.distinct.values())).argsort()
        if isinstance(next(iter(parts.values())), Tensor):
            return torch.cat(list(parts.values()))[order]
        return tuple(torch.cat(outputs)[order] for outputs in zip(*parts.values(), strict=True))

    def _of_slot(self, slot: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The gate with the parameters of one slot, on tokens `[n, hidden]`."""
        return self.run_with(self._values.get(slot, {}), x, *args, **kwargs)
