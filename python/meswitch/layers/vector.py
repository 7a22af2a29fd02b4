"""Norms, and whatever else computes with small parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meswitch.errors import UnsupportedModelError
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.rows import Rows
from meswitch.layers.bank import Bank
from meswitch.layers.first_input import FirstInput
from meswitch.layers.step import Step
from meswitch.layers.wrapper import Wrapper
from meswitch.reference import restored
from meswitch.site import Site


class VectorWrapper(Wrapper):
    """A module whose parameters are vectors, or small matrices, that it applies to each token alike.

    It runs with one value of them per token, gathered from a `Bank` by slot; `probe` tries that on random tokens, and
    a module that computes something else then is `refused`.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        step: Step,
        kernels: Kernels,
        shapes: Mapping[str, tuple[int, ...]],
        first_input: FirstInput,
    ) -> None:
        """`shapes`: of the base's parameters. `first_input`: of the module."""
        super().__init__(name, module, step, kernels)
        self.shapes, self.first_input = shapes, first_input
        self.banks: dict[str, Bank] = {}

    def check(self, leaf: str, site: Site) -> None:
        if self.shapes.get(leaf) != tuple(site.shape):
            raise self.shape_mismatch(site, self.shapes.get(leaf), tuple(site.shape))

    def refused(self, leaf: str, site: Site) -> UnsupportedModelError:
        """The error for a module that `probe` says cannot be served."""
        return UnsupportedModelError(
            f"{site.name}: no way to give each request its own {leaf} {tuple(site.shape)} "
            f"in a module of type {type(self.module).__name__}"
        )

    def set(self, slot: int, leaf: str, site: Site) -> None:
        self.slots.add(slot)
        base: Tensor = getattr(self.module, leaf)
        if leaf not in self.banks:
            self.banks[leaf] = Bank(base)
        self.banks[leaf].set(slot, restored(site, base.detach().cpu()))

    def clear(self, slot: int) -> None:
        super().clear(slot)
        for bank in self.banks.values():
            bank.clear(slot)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = self.step.tokens
        if not self.active(rows):
            return self.base_forward(x, *args, **kwargs)
        if self.kernels.exact:
            return self._by_slot(rows, x, *args, **kwargs)
        if rows.only_slot is not None:  # all tokens belong to one expert, so the number of rows does not matter
            only = {leaf: bank.value(rows.only_slot) for leaf, bank in self.banks.items()}
            return self.run_with(only, x, *args, **kwargs)
        values = {leaf: bank.gather(rows, self.step.last_slot) for leaf, bank in self.banks.items()}
        return self._run(values, x, *args, **kwargs)

    def _by_slot(self, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module as it is, on the tokens of one slot after another: nothing that others change is in between."""
        if len(rows.distinct) == 1:
            return self._of_slot(rows.slots[0], x, *args, **kwargs)
        axis = self._token_axis(x, len(rows), next(iter(self.banks.values())).dim)
        y: Tensor | None = None
        for slot, index in rows.distinct.items():
            part = self._of_slot(slot, x.index_select(axis, index), *args, **kwargs)
            y = part.new_empty(x.shape) if y is None else y
            y.index_copy_(axis, index, part)
        return y

    def _of_slot(self, slot: int, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if slot not in self.slots:
            return self.base_forward(x, *args, **kwargs)
        return self.run_with({leaf: bank.value(slot) for leaf, bank in self.banks.items()}, x, *args, **kwargs)

    def _run(self, values: Mapping[str, Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module on `x`, each token with its own row of `values [T, ...]`."""
        shaped = {leaf: self._per_token(value, x) for leaf, value in values.items()}
        if type(self.module) in (nn.LayerNorm, nn.RMSNorm):
            return self._normalized(shaped, x)
        return self.run_with(shaped, x, *args, **kwargs)

    def _normalized(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """torch's own norms check the shape of their parameters, so these are applied outside, in float32."""
        module = self.module
        if isinstance(module, nn.LayerNorm):
            y = F.layer_norm(x.float(), module.normalized_shape, None, None, module.eps)
        else:
            assert isinstance(module, nn.RMSNorm)
            eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
            y = F.rms_norm(x.float(), list(module.normalized_shape), None, eps)
        weight, bias = values.get("weight", module.weight), values.get("bias", getattr(module, "bias", None))
        y = y if weight is None else y * weight.float()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def _per_token(self, value: Tensor, x: Tensor) -> Tensor:
        """`value [T, *own]` shaped to broadcast over `x`, whose axes before `own` hold the tokens once."""
        own = value.dim() - 1
        if tuple(x.shape[x.dim() - own :]) != tuple(value.shape[1:]):
            self.expect_rows(x[..., 0].numel() if x.dim() else 0, self.step.tokens)
        shape = [1] * (x.dim() - own)
        shape[self._token_axis(x, value.shape[0], own)] = value.shape[0]
        return value.view(*shape, *value.shape[1:])

    def _token_axis(self, x: Tensor, tokens: int, own: int) -> int:
        """The axis of `x` that the tokens lie along; the last `own` axes are each token's own."""
        axes = [axis for axis, size in enumerate(x.shape[: x.dim() - own]) if size == tokens]
        if not axes:
            self.expect_rows(x[..., 0].numel() if x.dim() else 0, self.step.tokens)
        if len(axes) > 1:  # as many heads as tokens
            axes = [axis for axis in axes if axis in self.first_input.other_axes(x)] or axes
        return max(axes or [0], key=x.stride)  # in a module that has not run yet: tokens lie outermost in memory

    def probe(self, leaf: str) -> bool:
        """Whether the module, given one value per token, computes what it would with each value in turn.

        Runs the module with other parameters, so nobody else may run it meanwhile.
        """
        parameter: Tensor = getattr(self.module, leaf)
        if parameter.dim() > 2:
            return False
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 5, *parameter.shape, generator=generator).to(parameter)
        values = torch.randn(5, *parameter.shape, generator=generator).to(parameter)
        own = self.module._parameters[leaf]
        try:
            together = self._run({leaf: values}, x)
            apart = []
            for token in range(5):
                self.module._parameters[leaf] = values[token]  # type: ignore[assignment]
                apart.append(self.base_forward(x[:, token : token + 1]))
            return bool(torch.allclose(together.float(), torch.cat(apart, dim=1).float(), rtol=1e-2, atol=1e-2))
        except Exception:  # whatever this module does with its parameter, it is not per token
            return False
        finally:
            self.module._parameters[leaf] = own
