"""Modules of MoE experts: every token's products with the MoE experts that its gate chose, and its fine-tune's deltas.

hidden [T, H] ── each row once for each of its k choices [T·k, H] ──┬─ gate ─┐
                                                                   └─ up ───┴─ activation ── down ── weighed, summed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.names import StackPlace
from meswitch.kernels.protocol import DeltaLinear, Kernels
from meswitch.kernels.rows import BASE_SLOT, Rows
from meswitch.layers.step import Step
from meswitch.layers.wrapper import Wrapper
from meswitch.site import LowRankSite, QuantizedSite, ReplacedSite, SharedSite, Site

STACKS = ("gate_up_proj", "down_proj")
"""The parameters of a module of MoE experts, each `[MoE experts, out_features, in_features]`."""


def has_moe_experts(module: nn.Module) -> bool:
    """Whether a module holds MoE experts as transformers stacks them, in whatever form."""
    return any(weight.dim() == 3 for name in STACKS if (weight := module._parameters.get(name)) is not None)


def is_plain(module: nn.Module) -> bool:
    """Whether a module of MoE experts computes what `MoeWrapper` does: transformers' interface in its plain form, and
    no forward in its place, such as that of MoE experts which stay on disk."""
    plain = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    plain["has_post_expert_norm"] = False
    flags = all(getattr(module, flag, None) == value for flag, value in plain.items())
    own = hasattr(module, "_apply_gate") and set(module._parameters) == set(STACKS)
    return flags and own and "forward" not in module.__dict__


def fits(site: Site, place: StackPlace, stack: Tensor) -> bool:
    """Whether a site is a piece of a MoE expert in a stack `[MoE experts, out_features, in_features]`."""
    moe_experts, out_features, in_features = stack.shape
    rows = site.shape[0]
    if len(site.shape) != 2 or site.shape[1] != in_features or not rows or out_features % rows:
        return False
    transposed = isinstance(site, QuantizedSite | LowRankSite) and site.transposed
    return not transposed and place.moe_expert < moe_experts and place.piece < out_features // rows


class MoeWrapper(Wrapper):
    """A module of MoE experts in transformers' plain form.

    `place` finds a site in the stacks by its name. `packed`: whether the base keeps its MoE experts packed; their sites
    are then given to the slot `BASE_SLOT`. A delta's key in the tables is its slot and MoE expert in one number.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        step: Step,
        kernels: Kernels,
        place: Callable[[str], StackPlace | None],
        *,
        packed: bool = False,
    ) -> None:
        super().__init__(name, module, step, kernels)
        self._place = place
        self._plain = is_plain(module)
        self._count = next(len(getattr(module, stack)) for stack in STACKS if hasattr(module, stack))
        self._packed = packed
        self._stacks = {stack: _Stack(module, stack, kernels, packed=packed) for stack in STACKS}

    def check(self, leaf: str, site: Site) -> None:
        place = self._place(site.name)
        if not self._plain or place is None:
            raise UnsupportedModelError(
                f"{site.name}: no way to give each request its own MoE experts of type {type(self.module).__name__}",
                hint="served are MoE experts in memory that transformers stacks from plain matrices, without biases",
            )
        stack: Tensor = getattr(self.module, leaf)
        if not fits(site, place, stack):
            raise self.shape_mismatch(site, f"piece {place.piece} of {tuple(stack.shape)}", tuple(site.shape))

    def set(self, slot: int, leaf: str, site: Site) -> None:
        place = self._place(site.name)
        assert place is not None, "checked"
        self.slots.add(slot)
        self._stacks[leaf].set(self._key(slot, place.moe_expert), place.piece, site)

    def clear_moe_expert(self, slot: int, moe_expert: int) -> None:
        """The slot has nothing of one MoE expert any more."""
        key = self._key(slot, moe_expert)
        for stack in self._stacks.values():
            stack.clear(range(key, key + 1))

    def clear(self, slot: int) -> None:
        super().clear(slot)
        first = self._key(slot, 0)
        for stack in self._stacks.values():
            stack.clear(range(first, first + self._count))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        active = self.active(self.step.tokens)
        if not active and not self._packed and not self.kernels.exact:
            base: Tensor = self.base_forward(hidden_states, top_k_index, top_k_weights)
            return base
        tokens, choices = top_k_index.shape
        # An index beyond the MoE experts is that of a row that only fills up a step.
        chosen = top_k_index.masked_fill(top_k_index >= self._count, BASE_SLOT)
        rows = [Rows.of_tensor(chosen.reshape(-1))]
        if active:
            self.expect_rows(len(hidden_states), self.step.tokens)
            rows.append(self._own_rows(chosen))
        y = self._of_rows(hidden_states.repeat_interleave(choices, dim=0), *rows) * top_k_weights.reshape(-1, 1)
        return y.view(tokens, choices, -1).sum(dim=1).to(hidden_states.dtype)

    def outputs(self, x: Tensor, chosen: Tensor) -> Tensor:
        """What the base's MoE experts `chosen [S]` make of rows `x [S, H]`, one each."""
        return self._of_rows(x, Rows.of_tensor(chosen)) if len(x) else x

    def _of_rows(self, x: Tensor, *rows: Rows) -> Tensor:
        gate_up = self._stacks["gate_up_proj"].product(x, *rows)
        return self._stacks["down_proj"].product(self.module._apply_gate(gate_up), *rows)  # type: ignore[operator]

    def _own_rows(self, chosen: Tensor) -> Rows:
        """The key of every choice `[T, k]` of a fine-tune's token; the base's have none."""
        slots = self.step.tokens.bank_index.unsqueeze(1)  # slot + 1; 0 is the base
        keys = slots * self._count + chosen
        return Rows.of_tensor(keys.masked_fill((slots == 0) | (chosen == BASE_SLOT), BASE_SLOT).reshape(-1))

    def _key(self, slot: int, moe_expert: int) -> int:
        return (slot - BASE_SLOT) * self._count + moe_expert


def packed_experts(
    module: nn.Module, kernels: Kernels, place: Callable[[str], StackPlace | None], sites: Iterable[Site]
) -> MoeWrapper:
    """The packed MoE experts of a module, for `outputs` alone; `place` as in `MoeWrapper`."""
    wrapper = MoeWrapper("", module, Step(), kernels, place, packed=True)
    for site in sites:
        found = place(site.name)
        assert found is not None, "a site of a stack"
        wrapper.set(BASE_SLOT, found.parameter.rpartition(".")[2], site)
    return wrapper


class _Stack:
    """The products of one stack of MoE experts, by key.

    What lies one below another in a MoE expert is a *piece* each: most models store gate and up apart.
    """

    def __init__(self, module: nn.Module, name: str, kernels: Kernels, *, packed: bool) -> None:
        self._module, self._name, self._kernels, self._packed = module, name, kernels, packed
        self._tables: dict[int, DeltaLinear] = {}  # by piece
        self._replaced: dict[int, dict[int, Tensor]] = {}  # weights of their own, by piece and key
        self._rows: dict[int, slice] = {}  # of each piece

    def set(self, key: int, piece: int, site: Site) -> None:
        if isinstance(site, SharedSite):
            return
        rows = site.shape[0]
        self._rows[piece] = slice(piece * rows, (piece + 1) * rows)
        if isinstance(site, ReplacedSite):
            self._replaced.setdefault(piece, {})[key] = site.value.to(self._weight.device)
            return
        if piece not in self._tables:
            self._tables[piece] = self._kernels.linear(
                self._module, self._module.forward, rows, site.in_features, many_rows=False
            )
        self._tables[piece].set(key, site)

    def clear(self, keys: range) -> None:
        for table in self._tables.values():
            for key in keys:
                table.set(key, None)
        for replaced in self._replaced.values():
            for key in keys:
                replaced.pop(key, None)

    def product(self, x: Tensor, base: Rows, own: Rows | None = None) -> Tensor:
        """`x [n, in_features]` times each row's MoE expert; `own`: the rows' keys where they have deltas."""
        y = x.new_zeros(len(x), self._weight.shape[1])
        if not self._packed:
            for moe_expert, index in base.groups.items():
                y[index] = F.linear(x[index], self._weight[moe_expert])
        for rows in ([base] if self._packed else []) + ([] if own is None else [own]):
            for piece, table in self._tables.items():
                table.add(y[:, self._rows[piece]], x, rows)
            self._replace(y, x, rows)
        return y

    def _replace(self, y: Tensor, x: Tensor, rows: Rows) -> None:
        for piece, weights in self._replaced.items():
            for key in weights.keys() & rows.groups.keys():
                index = rows.groups[key]
                y[index, self._rows[piece]] = F.linear(x[index], weights[key].to(x.dtype))

    @property
    def _weight(self) -> Tensor:
        weight: Tensor = getattr(self._module, self._name)
        return weight
