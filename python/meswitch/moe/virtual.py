"""SwapMoE's virtual experts (arXiv 2308.15030): a resident set a layer that follows what is asked.

    each forward ── the gate's choice of all MoE experts ── importance, a MoE expert ─┐
    between requests ── swaps under a cap of bytes ◂── resident set ◂─────────────────┘
                        └ loaded by whoever holds the weights, then `take`n: masks change

Importance is Σ ‖x‖ · weight · strength over the tokens that choose a MoE expert, and fades from request to request. The
paper's strength is the norm of the weights; the output gain, measured over text, tells more. Sizes of the sets come
from a dynamic program over layers, where the paper searches with a genetic algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from meswitch.errors import BudgetError
from meswitch.huggingface.names import moe_blocks
from meswitch.moe.gate import Choice, Gate

DECAY = 0.9
"""What is left of importance after one more request."""

_MOST_UNITS = 2**14  # what `divide` counts bytes in, at most: its tables have a column each


def weight_norms(experts: nn.Module) -> Tensor:
    """The norm of all weights of each MoE expert, the paper's strength: `float32 [MoE experts]`."""
    stacks = [stack.detach().float().flatten(1) for stack in experts.parameters()]
    norms: Tensor = torch.linalg.vector_norm(torch.cat(stacks, dim=1), dim=1)
    return norms


class OutputProfile:
    """How much each MoE expert of a block added while text ran: sums over the tokens that chose it.

    `tokens`, `inputs` Σ weight · ‖x‖, `outputs` Σ weight · ‖E(x)‖: `float64 [MoE experts]`. `outputs` is the saliency
    of REAP (arXiv 2510.13999), as a sum.
    """

    def __init__(self, count: int) -> None:
        self.tokens: Tensor
        self.inputs: Tensor
        self.outputs: Tensor
        self.tokens, self.inputs, self.outputs = torch.zeros(3, count, dtype=torch.float64)

    @property
    def gain(self) -> Tensor:
        """Σ weight · ‖E(x)‖ / Σ weight · ‖x‖, a strength; the mean one where no token chose: `float32`."""
        seen = self.inputs > 0
        gain = self.outputs / self.inputs.where(seen, torch.ones_like(self.inputs))
        mean = self.outputs.sum() / self.inputs.sum()
        return gain.where(seen, mean).float()

    def add(self, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Counts one call of a module of MoE experts, in transformers' interface. Runs them once more."""
        ones = torch.ones_like(weights[:, :1])
        one_by_one = index.split(1, dim=-1)
        norms: list[Tensor] = [
            experts.forward(hidden, choice, ones).norm(dim=-1) for choice in one_by_one
        ]  # calls no hook again
        flat, strength = index.flatten(), weights.abs().double()
        self.tokens.index_add_(0, flat, torch.ones(len(flat), dtype=torch.float64))
        self.inputs.index_add_(0, flat, (strength * hidden.norm(dim=-1, keepdim=True)).flatten())
        self.outputs.index_add_(0, flat, (strength * torch.stack(norms, dim=1)).flatten())


@contextmanager
def profile_outputs(model: nn.Module) -> Iterator[list[OutputProfile]]:
    """Profiles of each MoE block, in the order of the layers, of all that the model runs inside; on the host."""
    blocks: list[Any] = [block.experts for _, block in moe_blocks(model)]
    profiles = [OutputProfile(experts.num_experts) for experts in blocks]

    def watch(profile: OutputProfile) -> Any:
        return lambda experts, args, output: profile.add(experts, *args)

    handles = [experts.register_forward_hook(watch(profile)) for experts, profile in zip(blocks, profiles, strict=True)]
    try:
        yield profiles
    finally:
        for handle in handles:
            handle.remove()


class Importance:
    """How much the MoE experts of a layer matter now: `values`, `float32 [MoE experts]`.

    `strength`: of each MoE expert, `weight_norms` or an `OutputProfile.gain`; NaN where it is not known yet, which
    counts as the mean of the others. `decay`: what is left of older requests after one more. `values`: to begin with.
    """

    def __init__(self, strength: Tensor, decay: float = DECAY, values: Tensor | None = None) -> None:
        self.strength = strength
        self.values = torch.zeros_like(strength) if values is None else values
        self._decay = decay
        self._now = torch.zeros_like(strength)

    def add(self, choice: Choice) -> None:
        """Counts the tokens of one forward. An index beyond the MoE experts is of a row that only fills up a step."""
        mass = choice.hidden.norm(dim=-1, keepdim=True) * choice.weights
        real = choice.indices < len(self._now)
        self._now.index_add_(0, choice.indices[real], mass[real].to(self._now.dtype))

    def fade(self) -> None:
        """Ends a request: what was counted since the last one joins `values`, of which the older part decays."""
        strength = self.strength.where(~self.strength.isnan(), self.strength.nanmean())
        self.values = self._decay * self.values + self._now * strength
        self._now = torch.zeros_like(self._now)


class Swap(NamedTuple):
    """In `layer`, MoE expert `leaves` gives its place to `enters`."""

    layer: int
    leaves: int
    enters: int


class VirtualExperts:
    """The resident sets of a model's gates, and how they follow importance.

    `resident`: `bool [MoE experts]` of each gate. `sizes`: bytes of one MoE expert of each gate. `least`: how many are
    resident in a layer at any time, so fewer leave one than it has beyond that; 0 where those that enter are loaded
    before others leave.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        importance: Sequence[Importance],
        resident: Sequence[Tensor],
        *,
        sizes: Sequence[int],
        least: int = 0,
    ) -> None:
        self.resident = [own.clone() for own in resident]
        self._gates, self._importance = gates, importance
        self._sizes, self._least = sizes, least
        for gate, own, counted in zip(gates, self.resident, importance, strict=True):
            gate.restrict(own)
            gate.observer = counted.add

    def propose(self, cap: int) -> list[Swap]:
        """Ends a request: the swaps that gain most importance a byte, within `cap` bytes to load. Waits for the device.

        The importance of a layer counts as a share of that layer's. None of an earlier proposal may be under way.
        """
        gains: list[tuple[float, Swap]] = []
        for layer, (own, counted) in enumerate(zip(self.resident, self._importance, strict=True)):
            counted.fade()
            share = counted.values / counted.values.sum().clamp_min(torch.finfo(torch.float32).tiny)
            held, absent = own.nonzero().flatten(), (~own).nonzero().flatten()
            leave, enter = held[share[held].argsort()], absent[share[absent].argsort(descending=True)]
            leave = leave[: max(len(held) - self._least, 0)]
            for out, into in zip(leave.tolist(), enter.tolist(), strict=False):
                gain = float(share[into] - share[out])
                if gain <= 0:
                    break
                gains.append((gain / self._sizes[layer], Swap(layer, out, into)))
        chosen, left = [], cap
        for _, swap in sorted(gains, reverse=True):
            if self._sizes[swap.layer] > left:
                break
            chosen.append(swap)
            left -= self._sizes[swap.layer]
        return chosen

    def take(self, swaps: Sequence[Swap]) -> None:
        """The MoE experts that enter are loaded: gates may choose them from the next forward on."""
        for layer, leaves, enters in swaps:
            self.leave(layer, leaves)
            self.enter(layer, enters)

    def leave(self, layer: int, moe_expert: int) -> None:
        """From the next forward on gates do not choose this one."""
        self._set(layer, moe_expert, resident=False)

    def enter(self, layer: int, moe_expert: int) -> None:
        """This one is loaded: gates may choose it from the next forward on."""
        self._set(layer, moe_expert, resident=True)

    def _set(self, layer: int, moe_expert: int, *, resident: bool) -> None:
        own = self.resident[layer].clone()
        own[moe_expert] = resident
        self.resident[layer] = own
        self._gates[layer].restrict(own)


def largest(values: Tensor, count: int) -> Tensor:
    """The `count` MoE experts of the largest values, as a resident set: `bool [MoE experts]`."""
    resident = torch.zeros(len(values), dtype=torch.bool)
    resident[values.topk(count).indices] = True
    return resident


def tail(values: Tensor) -> list[float]:
    """The share of importance outside the `n` largest, for n from 0 on: a layer's losses for `divide`."""
    ordered = values.double().sort(descending=True).values
    missing = ordered.sum() - torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    return list((missing / ordered.sum()).clamp_min(0).tolist())


def divide(losses: Sequence[Sequence[float]], sizes: Sequence[int], budget: int, *, least: int) -> list[int]:
    """How many MoE experts of each layer are resident for the smallest sum of losses within `budget` bytes.

    `losses[l][n]`: of layer l with n resident; `sizes`: bytes of one MoE expert of each layer; `least`: resident in
    each layer at least, what a token takes. By dynamic programming over layers and bytes: exact where the bytes beyond
    the least are no more than 16,384 times the greatest common divisor of `sizes`, else with sizes rounded up to that
    share.

    Raises `BudgetError` where `least` of each do not fit.

    >>> divide([[9, 3, 2], [9, 8, 1]], [10, 10], 35, least=1)
    [1, 2]
    """
    needed = least * sum(sizes)
    if needed > budget:
        raise BudgetError(f"expected at least {needed} bytes for {least} MoE experts a layer, found {budget}")
    more = [loss[least:] for loss in losses]  # by how many are resident beyond the least
    spare = min(budget - needed, sum(size * (len(loss) - 1) for size, loss in zip(sizes, more, strict=True)))
    unit = max(math.gcd(*sizes), spare // _MOST_UNITS)
    steps = [-(-size // unit) for size in sizes]
    most = spare // unit
    best: NDArray[np.float64] = np.zeros(most + 1)  # by what may be spent
    picks: list[NDArray[np.int64]] = []
    for loss, step in zip(more, steps, strict=True):
        spent = [np.full(most + 1, np.inf) for _ in loss]
        for n in range(min(len(loss), most // step + 1)):
            spent[n][n * step :] = best[: most + 1 - n * step] + loss[n]
        table = np.stack(spent)
        picks.append(table.argmin(0))
        best = table.min(0)
    counts, left = [], most
    for pick, step in zip(reversed(picks), reversed(steps), strict=True):
        extra = int(pick[left])
        counts.append(least + extra)
        left -= extra * step
    return counts[::-1]
