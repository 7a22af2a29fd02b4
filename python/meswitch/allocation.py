"""Bits where they matter: how each site is stored so that a whole delta weighs at most a target and loses least.

    every site ── probe: the error each candidate leaves in some rows, × sensitivity ── forms: bytes and loss
                                                                                         └ lower hull of each site
    all sites ── steps down their hulls, the largest loss a byte first, until the target is reached

A *form* is a way to store one site. Embeddings and head also have forms that give each row its own bits: the rows' own
trade of loss against bytes at a price, for a range of prices (Lagrange). Sites that are bit-equal cost nothing and have
no forms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from meswitch import _native
from meswitch.checkpoint import Checkpoint
from meswitch.errors import BudgetError
from meswitch.reference import part_bytes, row_bytes

Plan = dict[str, Any]
"""How one site is stored, as the native half takes it, with its `role`: block, embedding or head."""

_SAMPLE = {"block": 2**19, "embedding": 2**20, "head": 2**20}  # weights measured of a site, at least 64 rows
_WIDTHS = (1, 2, 3, 4, 8)
_RANKS = (0, 2, 4, 8, 16, 32)
_GROUP, _SALIENT = 64, 8
_ROW_RANKS = (0, 1, 2, 4, 8)  # where rows have their own bits
_ROW = 6  # bytes of a row's scale and number
_PRICES = 48  # of a byte
_HEADSTART = 10  # of the first token's rank: Zipf's law is flatter there
# What leaving a delta out costs, over what noise of its size would: an error along the delta adds up over tokens and
# sites. Measured on the tiny family: 10 to 100 over sites.
_COHERENCE = 32.0
# What is left of a loss where channels make up for one another's errors; measured on the tiny family.
_COMPENSATED = 0.2
_ALIGNMENT = 64


@dataclass(frozen=True)
class Form:
    """One way to store a site: a plan, its bytes with all that names them, and the loss that is predicted of it.

    `widths` are the bits of each row, `uint8 [rows]`, where rows have their own; none (0) leaves a row as it is.
    """

    plan: Plan
    bytes: int
    loss: float
    widths: Tensor | None = None

    def finished(self) -> Plan:
        """The plan with the rows' widths written out."""
        if self.widths is None:
            return self.plan
        found = [(bits, torch.nonzero(self.widths == bits).flatten().tolist()) for bits in self._widths()]
        most = max((entry for entry in found if entry[0]), key=lambda entry: len(entry[1]), default=(1, []))
        return {**self.plan, "bits": most[0], "classes": [entry for entry in found if entry[0] != most[0]]}

    def _widths(self) -> list[int]:
        return [self.plan["bits"]] if self.widths is None else self.widths.unique().tolist()

    @property
    def kind(self) -> str:
        """The form in a few words.

        >>> plan = {"bits": 1, "rank": 8, "salient": 0, "group_size": None}
        >>> Form(plan, 10, 0.5, torch.tensor([0, 4, 1, 4])).kind
        '0/1/4 bits, rank 8'
        """
        if self.plan["bits"] is None:
            return "whole"
        widths = self._widths()
        said = ["/".join(map(str, widths)) + (" bit" if widths in ([0], [1]) else " bits")]
        for key, word in (("rank", "rank"), ("group_size", "groups of"), ("salient", "salient")):
            if self.plan[key]:
                said.append(f"{word} {self.plan[key]}")
        return ", ".join(said)


@dataclass(frozen=True)
class Allocation:
    """All plans, the form that was chosen for each open site, and the bytes that everything will weigh at most."""

    plans: list[Plan]
    forms: dict[str, Form]
    bytes: int

    @property
    def uncounted(self) -> int:
        """Bytes that are no single site's, and what the sites' own counts are off by."""
        return self.bytes - sum(form.bytes for form in self.forms.values())

    @property
    def loss(self) -> float:
        """Predicted: nats a token where sensitivity is known, else in a unit of its own."""
        return sum(form.loss for form in self.forms.values())

    def summary(self) -> list[dict[str, Any]]:
        """`{role, form, sites, bytes_share, loss_share}` of each role and form, shares of the sites listed."""
        weight, loss = sum(form.bytes for form in self.forms.values()), self.loss
        groups: dict[tuple[str, str], list[Form]] = {}
        for form in self.forms.values():
            groups.setdefault((form.plan["role"], form.kind), []).append(form)
        return [
            {
                "role": role,
                "form": kind,
                "sites": len(forms),
                "bytes_share": round(sum(form.bytes for form in forms) / weight, 4) if weight else 0.0,
                "loss_share": round(sum(form.loss for form in forms) / loss, 4) if loss else 0.0,
            }
            for (role, kind), forms in sorted(groups.items())
        ]


@dataclass(frozen=True)
class Costs:
    """What errors cost: E[x²] by site, the rows' sensitivity (`sensitivity.sense`), how likely each token is.

    A site without sensitivity loses its relative error times its number of weights, whatever its role; rows of
    embeddings and head then weigh as their tokens are likely: by `frequencies` or, without, as 1 / rank in the
    tokenizer's order (Zipf). `compensated`: errors of what is not an embedding will be.
    """

    moments: dict[str, Tensor] = field(default_factory=dict)
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    frequencies: Tensor | None = None
    compensated: bool = False


def allocate(
    base: Checkpoint,
    finetune: Checkpoint,
    plans: Sequence[Plan],
    costs: Costs,
    target: int,
    weigh: Callable[[Allocation], int],
    progress: Callable[[str, int, int], None],
) -> Allocation:
    """Chooses how every site is stored so that `weigh` finds at most `target` bytes.

    `plans` with `bits` none, and those `shared` with the base, stay as they are. `progress` gets a site's name, weights
    done and in all. The same arguments make the same choice.

    Raises `BudgetError` where even the smallest forms are too much, with the bytes they need; `NonFiniteError`.
    """
    sites = [_Site(base, finetune, plan, costs) for plan in plans if plan["bits"] is not None and not plan["shared"]]
    _compare(sites)
    menus, done, total = {}, 0, sum(site.parameters for site in sites)
    for site in sites:
        progress(site.name, done, total)
        menus[site.name] = hull(site.forms())
        done += site.parameters
    progress("", done, total)

    def outcome(chosen: dict[str, Form]) -> Allocation:
        made = [chosen[plan["name"]].finished() if plan["name"] in chosen else plan for plan in plans]
        return replace(found := Allocation(made, chosen, 0), bytes=weigh(found))

    smallest = outcome({name: menu[0] for name, menu in menus.items()})
    if smallest.bytes > target:
        raise BudgetError(
            f"expected a target of at least {smallest.bytes:,} bytes, found {target:,}",
            hint="that is every matrix in its smallest form; vectors are stored whole",
        )
    best = _within(target, menus, smallest.uncounted, outcome)
    again = _within(target, menus, best.uncounted, outcome)
    return min(best, again, key=lambda found: found.loss)


def _within(
    target: int, menus: dict[str, list[Form]], uncounted: int, outcome: Callable[[dict[str, Form]], Allocation]
) -> Allocation:
    """The choice for what `uncounted` bytes leave of the target, or for less where that turns out too little."""
    while True:
        found = outcome(choose(menus, target - uncounted))
        if found.bytes <= target or all(found.forms[name] is menu[0] for name, menu in menus.items()):
            return found
        uncounted += found.bytes - target


def _compare(sites: list[_Site]) -> None:
    """Gives sites without sensitivity (MoE experts that transformers fuses) the others' mean loss a weight."""
    known = [site for site in sites if site.known]
    if known:
        mean = sum(float((site.weight * site.energy).sum()) for site in known) / sum(s.parameters for s in known)
        for site in sites:
            if not site.known:
                site.weight *= mean


def hull(forms: Sequence[Form]) -> list[Form]:
    """The forms that no mixture of two others beats: from the smallest on, each losing less, at falling gains a byte.

    >>> forms = [Form({}, bytes, loss) for bytes, loss in [(10, 8.0), (20, 7.0), (30, 2.0), (35, 3.0), (40, 1.5)]]
    >>> [form.bytes for form in hull(forms)]
    [10, 30, 40]
    """
    kept: list[Form] = []
    for form in sorted(forms, key=lambda form: (form.bytes, form.loss)):
        if kept and form.loss >= kept[-1].loss:
            continue
        while len(kept) > 1 and _gain(kept[-2], kept[-1]) <= _gain(kept[-2], form):
            kept.pop()
        kept.append(form)
    return kept


def _gain(smaller: Form, larger: Form) -> float:
    return (smaller.loss - larger.loss) / max(larger.bytes - smaller.bytes, 1)


def choose(menus: dict[str, list[Form]], budget: int) -> dict[str, Form]:
    """A form a site, of at most `budget` bytes together where that can be, with the least loss.

    Steps along the hulls in order of their gain, until one does not fit; what room is left goes to the one site that
    makes most of it. That makes less of it than the step that did not fit would have, so more room is never more loss.

    >>> menu = [Form({}, 10, 8.0), Form({}, 30, 2.0), Form({}, 40, 1.5)]
    >>> [form.bytes for form in choose({"a": menu, "b": menu}, 75).values()]
    [40, 30]
    """
    steps = sorted(
        (-_gain(menu[at], menu[at + 1]), name, at + 1) for name, menu in menus.items() for at in range(len(menu) - 1)
    )
    chosen = {name: menu[0] for name, menu in menus.items()}
    room = budget - sum(form.bytes for form in chosen.values())
    for _, name, at in steps:
        more = menus[name][at].bytes - chosen[name].bytes
        if more > room:
            break
        chosen[name], room = menus[name][at], room - more
    jumps = [
        (form.loss - chosen[name].loss, name, form.bytes)
        for name, menu in menus.items()
        for form in menu
        if 0 < form.bytes - chosen[name].bytes <= room
    ]
    if jumps:
        _, name, size = min(jumps)
        chosen[name] = next(form for form in menus[name] if form.bytes == size)
    return chosen


class _Site:
    """One site and what is measured of it."""

    def __init__(self, base: Checkpoint, finetune: Checkpoint, plan: Plan, costs: Costs) -> None:
        self._plan, self.name, self._role = plan, plan["name"], plan["role"]
        shape, element = finetune.shape(self.name), finetune.dtype(self.name).itemsize
        self.parameters = prod(shape)
        moments = costs.moments.get(self.name)
        seen = None if moments is None else moments.float().contiguous().numpy().tobytes()
        self._arguments = (base.native, finetune.native, self.name, plan["transposed"], seen)
        self.energy = _floats(_native.energies(*self._arguments))
        self._rows = len(self.energy)
        self._columns = prod(shape[:-1]) if plan["transposed"] else shape[-1]
        self._whole = self.parameters * element
        self._added = (self.parameters - self._rows * self._columns) * element
        known = costs.sensitivity.get(self.name)
        self.known = known is not None and len(known) >= self._rows
        if known is not None and self.known:
            # Energies are in units of the mean of E[x²].
            self.weight = known[: self._rows].double() * (1.0 if moments is None else float(moments.double().mean()))
        else:
            self.weight = self._frequent(costs.frequencies)
        if costs.compensated and self._role != "embedding":
            self.weight = self.weight * _COMPENSATED

    def _frequent(self, frequencies: Tensor | None) -> Tensor:
        """Weights of the rows that make a relative error of one count as the site's number of weights."""
        often = torch.ones(self._rows, dtype=torch.float64)
        if self._role != "block" and frequencies is not None and len(frequencies) >= self._rows:
            often = frequencies[: self._rows].double()
        elif self._role != "block":
            often = 1 / torch.arange(_HEADSTART, self._rows + _HEADSTART, dtype=torch.float64)
        energy = float((often * self.energy).sum())
        return often * (self.parameters / energy) if energy > 0 else often

    def forms(self) -> list[Form]:
        """All the ways that are worth a look."""
        plans = [self._candidate(**wish) for wish in self._wishes()]
        whole = self.weight * self.energy
        rows, like = sample(whole, max(64, _SAMPLE[self._role] // self._columns))
        found = _native.probe(*self._arguments, rows.tolist(), plans)
        shares = [_floats(errors) / self.energy[rows].clamp_min(1e-300) for errors in found]
        losses = [whole * share[like] for share in shares]
        forms = [self._form(plan, float(loss.sum())) for plan, loss in zip(plans, losses, strict=True)]
        for rank in sorted({plan["rank"] for plan in plans}):
            by_bits = {
                plan["bits"]: loss
                for plan, loss in zip(plans, losses, strict=True)
                if plan["rank"] == rank and not plan["salient"] and plan["group_size"] is None
            }
            # One bit leaves much the same share of a row's energy under any low-rank part.
            beneath = whole * (by_bits[1] / losses[0].clamp_min(1e-300)).clamp(max=1.0)
            forms += self._uneven(rank, {0: beneath * _COHERENCE, **by_bits})
        stored = {**self._plan, "bits": None}
        return [*forms, Form(stored, self._weigh([("whole", self._whole)]), 0.0)]

    def _uneven(self, rank: int, losses: dict[int, Tensor]) -> list[Form]:
        """The site without codes; embeddings and head with rows of different widths, at a range of prices a byte."""
        plan = self._candidate(1, rank)
        none = torch.zeros(self._rows, dtype=torch.uint8)
        forms = [self._form(plan, float(losses[0].sum()), none)]
        if self._role == "block":
            return forms
        widths = torch.tensor(list(losses), dtype=torch.uint8)
        stacked = torch.stack(list(losses.values()))
        sizes = [row_bytes(bits, self._columns) + _ROW if bits else 0 for bits in losses]
        size = torch.tensor(sizes, dtype=torch.float64)[:, None]
        dearest = float((stacked[0] - stacked[1]).max()) / sizes[1]
        for price in torch.logspace(-7, 0, _PRICES, dtype=torch.float64) * dearest:
            taken = (stacked + price * size).argmin(0)
            loss = float(stacked.gather(0, taken[None]).sum())
            forms.append(self._form(plan, loss, widths[taken]))
        return forms

    def _wishes(self) -> list[dict[str, int]]:
        block = self._role == "block"
        ranks = [rank for rank in (_RANKS if block else _ROW_RANKS) if 4 * rank <= min(self._rows, self._columns)]
        if not block:
            return [{"bits": bits, "rank": rank} for rank in ranks for bits in _WIDTHS]
        wishes = [{"bits": bits, "rank": rank} for rank in ranks for bits in (1, 2)]
        wishes += [{"bits": bits} for bits in (3, 4, 8)]
        wishes += [{"bits": bits, "group_size": _GROUP} for bits in (1, 2, 3) if self._columns > _GROUP]
        return wishes + [{"bits": bits, "salient": _SALIENT} for bits in (1, 2) if self._columns > 8 * _SALIENT]

    def _candidate(self, bits: int, rank: int = 0, group_size: int | None = None, salient: int = 0) -> Plan:
        wish = {"bits": bits, "rank": rank, "group_size": group_size, "salient": salient}
        return {**self._plan, **wish, "classes": [], "skip_unchanged_rows": False}

    def _form(self, plan: Plan, loss: float, widths: Tensor | None = None) -> Form:
        """With its bytes: tensors on their alignment, and what header and manifest say of them."""
        counts = {plan["bits"]: self._rows}
        if widths is not None:
            counts = {bits: int(count) for bits, count in enumerate(torch.bincount(widths)) if bits and count}
        groups = 1 if plan["group_size"] is None else -(-self._columns // plan["group_size"])
        tensors: list[tuple[str, int]] = []
        for bits, rows in counts.items():
            tensors += [("codes.0", part_bytes(bits, rows, self._columns)), ("scales.0", 2 * rows * groups)]
            tensors += [("rows.0", 4 * rows)] if rows < self._rows else []
        tensors += [("column_scales", 2 * self._columns)] if tensors else []
        if plan["salient"]:
            tensors += [("salient_index", 4 * plan["salient"]), ("salient", 2 * self._rows * plan["salient"])]
        if plan["rank"]:
            tensors += [("u", 2 * self._rows * plan["rank"]), ("v", 2 * self._columns * plan["rank"])]
        if not tensors:
            tensors = [("codes.0", 0), ("scales.0", 0), ("rows.0", 0)]  # the format's way to say so
        tensors += [("added", self._added)] if self._added else []
        return Form(plan, self._weigh(tensors) + 40 * len(counts), loss, widths)

    def _weigh(self, tensors: list[tuple[str, int]]) -> int:
        """Bytes of tensors on their alignment, and about what header and manifest say of them and their padding."""
        said = sum(len(self.name) + 2 * len(role) + (185 if size % _ALIGNMENT else 115) for role, size in tensors)
        return said + sum(-(-size // _ALIGNMENT) * _ALIGNMENT for _, size in tensors)


def _floats(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32).double()


def sample(loss: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Some rows, rising, and for every row the place among them of one like it.

    All rows where there are no more than `count`. Else half of them evenly over the rows in order of loss, half evenly
    over the loss itself: what weighs much is measured closely.
    """
    rows = len(loss)
    if rows <= count:
        return torch.arange(rows), torch.arange(rows)
    order = torch.argsort(loss, descending=True, stable=True)
    spread = torch.linspace(0, rows - 1, count // 2).round().long()
    summed = loss[order].cumsum(0)
    heavy = torch.searchsorted(summed, torch.linspace(0, float(summed[-1]), count - count // 2).double())
    places = torch.cat([spread, heavy.clamp(max=rows - 1)]).unique()
    middles = (places[1:] + places[:-1]) / 2
    nearest = torch.searchsorted(middles, torch.arange(rows, dtype=middles.dtype))
    taken = order[places]
    rising = torch.argsort(taken)
    back = torch.empty_like(rising)
    back[rising] = torch.arange(len(rising))
    of_row = torch.empty(rows, dtype=torch.int64)
    of_row[order] = back[nearest]
    return taken[rising], of_row
