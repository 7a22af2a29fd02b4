"""The ways to store one site, and what each of them costs: bytes, and a loss that is measured on some rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from meswitch import _native
from meswitch.compression.plan import Plan
from meswitch.compression.presets import Rule
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.reference import BITS, part_bytes, row_bytes
from meswitch.site import matrix_shape

_SAMPLE = {"block": 2**19, "embedding": 2**20, "head": 2**20}  # weights measured of a site, at least 64 rows
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
        rule, widths = self.plan.rule, self.widths
        if widths is None or rule is None:
            return self.plan
        rows = {bits: tuple(torch.nonzero(widths == bits).flatten().tolist()) for bits in self._bits()}
        coded = {bits: own for bits, own in rows.items() if bits}
        most = max(coded, key=lambda bits: len(coded[bits]), default=1)
        row_bits = tuple((bits, own) for bits, own in rows.items() if bits != most)
        return replace(self.plan, rule=replace(rule, bits=most), row_bits=row_bits)

    def _bits(self) -> list[int]:
        if self.widths is not None:
            widths: list[int] = self.widths.unique().tolist()
            return widths
        return [] if self.plan.rule is None else [self.plan.rule.bits]

    @property
    def kind(self) -> str:
        """The form in a few words.

        >>> Form(Plan("w", rule=Rule(1, rank=8)), 10, 0.5, torch.tensor([0, 4, 1, 4])).kind
        '0/1/4 bits, rank 8'
        """
        rule = self.plan.rule
        if rule is None:
            return "whole"
        bits = self._bits()
        words = ["/".join(map(str, bits)) + (" bit" if bits in ([0], [1]) else " bits")]
        words += [f"rank {rule.rank}"] if rule.rank else []
        words += [f"groups of {rule.group_size}"] if rule.group_size else []
        words += [f"salient {rule.salient}"] if rule.salient else []
        return ", ".join(words)


@dataclass(frozen=True)
class Costs:
    """What errors cost: E[x²] by site, the rows' sensitivity (`measure_sensitivity`), how likely each token is.

    A site without sensitivity loses its relative error times its number of weights, whatever its role; rows of
    embeddings and head then weigh as their tokens are likely: by `frequencies` or, without, as 1 / rank in the
    tokenizer's order (Zipf). `compensated`: errors of what is not an embedding will be.
    """

    moments: dict[str, Tensor] = field(default_factory=dict)
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    frequencies: Tensor | None = None
    compensated: bool = False


class OpenSite:
    """One site and what is measured of it."""

    def __init__(self, base: Checkpoint, finetune: Checkpoint, plan: Plan, costs: Costs) -> None:
        assert plan.rule is not None
        self._plan, self._rule, self.name, self._role = plan, plan.rule, plan.name, plan.role
        shape, element = finetune.shape(self.name), finetune.dtype(self.name).itemsize
        self.parameters = prod(shape)
        moments = costs.moments.get(self.name)
        seen = None if moments is None else moments.float().contiguous().numpy().tobytes()
        self._arguments = (base.native, finetune.native, self.name, plan.transposed, seen)
        self.energy = _floats(_native.energies(*self._arguments))
        self._rows = len(self.energy)
        self._columns = matrix_shape(shape, transposed=plan.transposed)[1]
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
        rules = self._candidates()
        plans = [replace(self._plan, rule=rule, row_bits=()) for rule in rules]
        whole = self.weight * self.energy
        rows, like = sample(whole, max(64, _SAMPLE[self._role] // self._columns))
        found = _native.probe(*self._arguments, rows.tolist(), [plan.to_native() for plan in plans])
        shares = [_floats(errors) / self.energy[rows].clamp_min(1e-300) for errors in found]
        losses = [whole * share[like] for share in shares]
        forms = [self._form(plan, float(loss.sum())) for plan, loss in zip(plans, losses, strict=True)]
        for rank in sorted({rule.rank for rule in rules}):
            by_bits = {
                rule.bits: loss
                for rule, loss in zip(rules, losses, strict=True)
                if rule.rank == rank and not rule.salient and rule.group_size is None
            }
            # One bit leaves much the same share of a row's energy under any low-rank part.
            beneath = whole * (by_bits[1] / losses[0].clamp_min(1e-300)).clamp(max=1.0)
            forms += self._uneven(rank, {0: beneath * _COHERENCE, **by_bits})
        return [*forms, Form(replace(self._plan, rule=None), self._weigh([("whole", self._whole)]), 0.0)]

    def _uneven(self, rank: int, losses: dict[int, Tensor]) -> list[Form]:
        """The site without codes; embeddings and head with rows of different widths, at a range of prices a byte."""
        plan = replace(self._plan, rule=self._candidate(1, rank), row_bits=())
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

    def _candidates(self) -> list[Rule]:
        block = self._role == "block"
        ranks = [rank for rank in (_RANKS if block else _ROW_RANKS) if 4 * rank <= min(self._rows, self._columns)]
        if not block:
            return [self._candidate(bits, rank) for rank in ranks for bits in BITS]
        rules = [self._candidate(bits, rank) for rank in ranks for bits in (1, 2)]
        rules += [self._candidate(bits) for bits in (3, 4, 8)]
        if self._columns > _GROUP:
            rules += [self._candidate(bits, group_size=_GROUP) for bits in (1, 2, 3)]
        if self._columns > 8 * _SALIENT:
            rules += [self._candidate(bits, salient=_SALIENT) for bits in (1, 2)]
        return rules

    def _candidate(self, bits: int, rank: int = 0, group_size: int | None = None, salient: int = 0) -> Rule:
        return replace(
            self._rule, bits=bits, rank=rank, group_size=group_size, salient=salient, skip_unchanged_rows=False
        )

    def _form(self, plan: Plan, loss: float, widths: Tensor | None = None) -> Form:
        """With its bytes: tensors on their alignment, and what header and manifest say of them."""
        rule = plan.rule
        assert rule is not None
        counts = {rule.bits: self._rows}
        if widths is not None:
            counts = {bits: int(count) for bits, count in enumerate(torch.bincount(widths)) if bits and count}
        groups = 1 if rule.group_size is None else -(-self._columns // rule.group_size)
        tensors: list[tuple[str, int]] = []
        for bits, rows in counts.items():
            tensors += [("codes.0", part_bytes(bits, rows, self._columns)), ("scales.0", 2 * rows * groups)]
            tensors += [("rows.0", 4 * rows)] if rows < self._rows else []
        tensors += [("column_scales", 2 * self._columns)] if tensors else []
        if rule.salient:
            tensors += [("salient_index", 4 * rule.salient), ("salient", 2 * self._rows * rule.salient)]
        if rule.rank:
            tensors += [("u", 2 * self._rows * rule.rank), ("v", 2 * self._columns * rule.rank)]
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
