"""Virtual experts while an engine runs: resident sets that follow what is asked, by swaps that no step waits for.

    before a step   arrivals ── gates may choose them
                    a round has ended: those that matter less leave, their memory is given back, others are read
    in a step       each gate's choice of all MoE experts ── importance, and how many of its choices it may not have

A round is `ROUND_TOKENS` tokens or more, and ends when all that was to be read has arrived. A swap takes one MoE expert
out of a layer's set before the other is read, so memory never exceeds the budget; no set falls below what a token
takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from meswitch.moe.gate import Choice, Gate
from meswitch.moe.profile import MoeProfile
from meswitch.moe.resident import Residents
from meswitch.moe.virtual import DECAY, Importance, VirtualExperts

_log = logging.getLogger(__name__)

ROUND_TOKENS = 128
"""Of all requests together: enough to tell what they are about. SwapMoE swaps after each request."""


def first_importance(counts: Iterable[int], profile: MoeProfile | None) -> list[Importance]:
    """Of layers with so many MoE experts each: a profile counts as if its text had been asked before, without end."""
    if profile is None:
        return [Importance(torch.full((count,), torch.nan)) for count in counts]
    rounds = ROUND_TOKENS / profile.tokens / (1 - DECAY)
    return [Importance(layer.gain.clone(), values=layer.importance * rounds) for layer in profile.layers.values()]


class SwapAllowance:
    """Bytes that may be read: `rate` of them a second since the start, saved up for a second at most, or until one
    MoE expert of `largest` bytes may be."""

    def __init__(self, rate: int, largest: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._most = rate, max(rate, largest)
        self._clock = clock
        self._saved, self._last = 0.0, clock()

    def left(self) -> int:
        """How many may be read now."""
        now = self._clock()
        self._saved = min(self._saved + (now - self._last) * self._rate, self._most)
        self._last = now
        return int(self._saved)

    def spend(self, size: int) -> None:
        """So many are being read."""
        self._saved -= size


class ExpertSwaps:
    """The resident sets of a model that runs, and their swaps; on the engine's thread, but `counters`.

    Reads `resident` (`bool [MoE experts]` of each gate) before it returns, and raises what reading raises. `least`: how
    many MoE experts a token takes in a layer. `norms`: whether strengths are the norms of the weights, which are known
    once a MoE expert was in memory. `allowance`: `None` for sets that stay as they are. A read that fails later ends
    the swaps and nothing else.
    """

    def __init__(
        self,
        gates: Sequence[Gate],
        residents: Residents,
        importance: Sequence[Importance],
        resident: Sequence[Tensor],
        *,
        least: int,
        allowance: SwapAllowance | None,
        norms: bool,
    ) -> None:
        self._gates, self._residents, self._importance = gates, residents, importance
        self._allowance, self._norms = allowance, norms
        self._counting = self._swapping = False
        self._tokens = 0
        self.choices = self.redirected = self.swaps = self.swapped_bytes = 0
        self._entering: set[tuple[int, int]] = set()
        self._fill(resident)
        self._sets = VirtualExperts(gates, importance, resident, sizes=residents.sizes, least=least)
        for layer, gate in enumerate(gates):
            gate.observer = lambda choice, layer=layer: self._count(layer, choice)
        self._swapping = allowance is not None

    @property
    def resident(self) -> list[Tensor]:
        """What each gate may choose: `bool [MoE experts]`."""
        return self._sets.resident

    def begin_step(self, tokens: int) -> None:
        """Before a step of so many tokens: takes up what has arrived, and begins the next swaps where it is time to."""
        self._take_arrivals()
        if self._swapping and not self._entering and self._tokens >= ROUND_TOKENS:
            self._begin_swaps()
        self._tokens += tokens
        self._counting = True

    def end_step(self) -> None:
        """After it: what else runs the model is no request's text."""
        self._counting = False

    def counters(self) -> dict[str, Any]:
        """`Residents.counters`, and since the start: `swaps` that have ended, and their `swapped_bytes`; `choices` of
        all tokens, and `redirected`, those of a MoE expert that was not resident."""
        names = ("swaps", "swapped_bytes", "choices", "redirected")
        return self._residents.counters() | {name: getattr(self, name) for name in names}

    def close(self) -> None:
        """Frees the memory, whatever is under way, and gives the gates back."""
        for gate in self._gates:
            gate.close()
        self._residents.close()

    def _fill(self, resident: Sequence[Tensor]) -> None:
        missing = {(layer, number) for layer, own in enumerate(resident) for number in own.nonzero().flatten().tolist()}
        for layer, number in sorted(missing):
            self._residents.load(layer, number)
        while missing:
            for layer, number, strength, error in self._residents.arrived(wait=True):
                if error is not None:
                    raise error
                missing.discard((layer, number))
                self._learn(layer, number, strength)

    def _learn(self, layer: int, moe_expert: int, strength: float) -> None:
        if self._norms:
            self._importance[layer].strength[moe_expert] = strength

    def _take_arrivals(self) -> None:
        for layer, moe_expert, strength, error in self._residents.arrived():
            self._entering.discard((layer, moe_expert))
            if error is not None:
                self._stop(error)
                continue
            self._learn(layer, moe_expert, strength)
            self._sets.enter(layer, moe_expert)
            self.swaps += 1
            self.swapped_bytes += self._residents.sizes[layer]

    def _stop(self, error: Exception) -> None:
        if self._swapping:
            _log.warning("resident MoE experts stay as they are from now on: %s", error)
        self._swapping = False

    def _begin_swaps(self) -> None:
        """Ends a round. Where not even one MoE expert may be read yet, it goes on."""
        assert self._allowance is not None, "without one there are no swaps"
        left = self._allowance.left()
        if left < min(self._residents.sizes):
            return
        self._tokens = 0
        for layer, leaves, enters in self._sets.propose(left):
            self._sets.leave(layer, leaves)
            self._residents.drop(layer, leaves)
            self._residents.load(layer, enters)
            self._entering.add((layer, enters))
            self._allowance.spend(self._residents.sizes[layer])

    def _count(self, layer: int, choice: Choice) -> None:
        if not self._counting:
            return
        resident = self._sets.resident[layer]
        chosen = choice.indices[choice.indices < len(resident)]
        self.choices += len(chosen)
        self.redirected += int((~resident[chosen]).sum())
        self._importance[layer].add(choice)
