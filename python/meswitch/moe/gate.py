"""Gates that choose among resident MoE experts only.

    hidden ── gate.forward ── scores of all ── torch.topk ── indices ── weights
                                  absent MoE experts rank last ┘            └ the family's own function of all scores

The ranking is masked and never the scores: a softmax over fewer MoE experts would weigh the chosen ones more than a
family that does not renormalize means to (OLMoE, DeepSeek-V2, Jamba).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meswitch.errors import BudgetError, UnsupportedModelError
from meswitch.huggingface.names import moe_blocks

_GATES = ("gate", "router")  # what transformers calls the module beside `experts`


class Choice(NamedTuple):
    """What a gate chose of all MoE experts: `hidden [T, H]`, `indices [T, k]`, `weights [T, k]`."""

    hidden: Tensor
    indices: Tensor
    weights: Tensor


class Gate:
    """The gate of one MoE block, and the set that it may choose from.

    From here on the module's forward is this one's, until `close`. `observer` is called after each forward with what
    the gate would choose if every MoE expert were resident.
    """

    def __init__(self, name: str, module: nn.Module, count: int) -> None:
        self.name, self.count = name, count
        self.observer: Callable[[Choice], None] | None = None
        self._module: Any = module
        self._forward = module.forward
        self._ranking: _ResidentRanking | None = None
        self._module.forward = self._run

    def restrict(self, resident: Tensor | None) -> None:
        """From the next forward on, only MoE experts with a true in `resident` (`bool [MoE experts]`) are chosen.

        `None` lifts that. Raises `ValueError` for another shape or dtype.
        """
        if resident is None:
            self._ranking = None
            return
        if resident.dtype != torch.bool or resident.shape != (self.count,):
            found = f"{resident.dtype} {list(resident.shape)}"
            raise ValueError(f"{self.name}: expected the resident set as bool [{self.count}], found {found}")
        self._ranking = _ResidentRanking(self.name, resident)

    @property
    def block(self) -> str:
        """The name of the gate's block, whose child `experts` has the MoE experts."""
        return self.name.rpartition(".")[0]

    def close(self) -> None:
        """Gives the module its own forward back."""
        self._module.__dict__.pop("forward", None)

    def _run(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's forward.

        Raises `BudgetError` where fewer MoE experts are resident than a token takes, and `UnsupportedModelError` for a
        gate that does not choose by `torch.topk` (Phi-MoE) or returns something else than (scores, weights, indices).
        """
        ranking = self._ranking
        output = None
        if self.observer is not None or ranking is None:
            output = self._forward(hidden, *args, **kwargs)
        if self.observer is not None:
            _, weights, index = self._checked(output)
            self.observer(Choice(hidden.reshape(-1, hidden.shape[-1]), index, weights))
        if ranking is None:
            return output
        ranking.ranked = False
        with ranking:
            output = self._forward(hidden, *args, **kwargs)
        if not ranking.ranked:
            raise self._unsupported("one that chooses its MoE experts by torch.topk")
        return self._checked(output)

    def _checked(self, output: Any) -> Any:
        if not isinstance(output, tuple) or len(output) != 3 or output[1].shape != output[2].shape:
            raise self._unsupported("one that returns (scores, weights, indices)")
        return output

    def _unsupported(self, expected: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.name}: expected a gate that can be limited to resident MoE experts, {expected}, found "
            f"{type(self._module).__name__}",
            hint="run this model with every MoE expert in memory",
        )


def take_gates(model: nn.Module) -> list[Gate]:
    """The gate of each MoE block of a model, in the order of the layers; call `close` on each in the end.

    Raises `UnsupportedModelError` for a model without MoE experts, and for one that does not keep them in transformers'
    experts interface (Switch).
    """
    blocks = list(_gates_and_counts(model))
    if not blocks:
        raise UnsupportedModelError(f"expected a model with MoE experts, found none: {type(model).__name__}")
    return [Gate(*block) for block in blocks]


def _gates_and_counts(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    for name, block in moe_blocks(model):
        gate = next((child for child in _GATES if isinstance(getattr(block, child, None), nn.Module)), None)
        count = getattr(block.experts, "num_experts", None)
        if gate is None or not hasattr(block.experts, "has_gate") or not isinstance(count, int):
            raise UnsupportedModelError(
                f"{name}: expected MoE experts in transformers' interface beside a gate, found "
                f"{type(block).__name__} with {type(block.experts).__name__}",
                hint="run this model with every MoE expert in memory",
            )
        yield f"{name}.{gate}", getattr(block, gate), count


class _ResidentRanking(TorchFunctionMode):
    """While it is entered, `torch.topk` over the scores of all MoE experts ranks absent ones last.

    Scores may be `[T, MoE experts]` or in groups, `[T, groups, MoE experts of a group]` (DeepSeek-V3). Values are those
    of the scores themselves. `ranked` tells that a choice was made.
    """

    def __init__(self, name: str, resident: Tensor) -> None:
        super().__init__()
        self._name, self._resident = name, resident
        self._count = int(resident.sum())
        self.ranked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rank = self._topk if func in (torch.topk, Tensor.topk) else func
        return rank(*args, **(kwargs or {}))

    def _topk(self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        resident = self._resident.to(input.device)
        experts = len(resident)
        along_experts = largest and dim in (-1, input.dim() - 1)
        if along_experts and input.shape[-1] == experts:
            if self._count < k:
                raise BudgetError(
                    f"{self._name}: expected at least {k} resident MoE experts, what a token takes, found {self._count}"
                )
            self.ranked = True
            # A resident one that the family ruled out (-inf: not in a chosen group) still ranks before absent ones.
            lowest = torch.finfo(input.dtype).min
            masked = torch.where(resident, input.clamp_min(lowest), -torch.inf)
            index = masked.topk(k, dim, sorted=sorted).indices
            return torch.return_types.topk((input.gather(dim, index), index))
        if along_experts and input.dim() > 2 and input.shape[-2] * input.shape[-1] == experts:
            # A group counts for its resident MoE experts; absent ones are worth as little as the worst.
            worst = input.amin((-2, -1), keepdim=True)
            input = torch.where(resident.view(input.shape[-2:]), input, worst)
        return input.topk(k, dim, largest, sorted)
