"""The ways to store one site, with their bytes and their loss, which is measured on a sample of its rows."""

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

_SAMPLE_WEIGHTS = {"block": 2**19, "embedding": 2**20, "head": 2**20}  # measured of a site, at least 64 rows
_RANKS = (0, 2, 4, 8, 16, 32)  # of block sites
_ROW_RANKS = (0, 1, 2, 4, 8)  # of embeddings and head, whose rows may have different widths
_GROUP_SIZE, _SALIENT = 64, 8
_ROW_BYTES = 6  # of a row's scale and number
_PRICES = 48  # how many prices of a byte are tried
_ZIPF_OFFSET = 10  # added to a token's rank: Zipf's law is flatter for the first ones
# The cost of leaving a delta out, relative to noise of the same size: an error along the delta adds up over tokens and
# sites. Measured on the tiny family: 10 to 100 over sites.
_COHERENCE = 32.0
# The share of a loss that remains where errors are compensated; measured on the tiny family.
_COMPENSATED = 0.2
_ALIGNMENT = 64


@dataclass(frozen=True)
class Form:
    """One way to store a site: its plan, its bytes (tensors, header and manifest), and its predicted loss.

    `widths uint8 [rows]`: the bits of each row, 0 for a row that stays as the base has it; `None` where all rows have
    the plan's.
    """

    plan: Plan
    bytes: int
    loss: float
    widths: Tensor | None = None

    def final_plan(self) -> Plan:
        """The plan with the widths of rows written into it."""
        rule, widths = self.plan.rule, self.widths
        if widths is None or rule is None:
            return self.plan
        rows = {bits: tuple(torch.nonzero(widths == bits).flatten().tolist()) for bits in self._bits()}
        coded = {bits: numbers for bits, numbers in rows.items() if bits}
        main_bits = max(coded, key=lambda bits: len(coded[bits]), default=1)
        row_bits = tuple((bits, numbers) for bits, numbers in rows.items() if bits != main_bits)
        return replace(self.plan, rule=replace(rule, bits=main_bits), row_bits=row_bits)

    def _bits(self) -> list[int]:
        """The bit widths that occur, rising."""
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
class ErrorCosts:
    """What errors cost: `moments` (E[x²]) and `sensitivity` by site, and the probability of each token.

    A site without sensitivity loses its relative error times its number of weights, whatever its role. Rows of its
    embedding or head then count as often as their tokens: by `frequencies [vocabulary]`, else as 1 / rank in the
    tokenizer's order (Zipf). `compensated`: whether the codec will compensate errors, which it does not in embeddings.
    """

    moments: dict[str, Tensor] = field(default_factory=dict)
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    frequencies: Tensor | None = None
    compensated: bool = False


class CandidateSite:
    """One site whose form is still to be chosen, and what is measured of it.

    `whole_model`: whether it is a weight itself and no delta. Then every row has codes: without any it would not be the
    base's but zeros, which costs more than the loss of a small error says.
    `energy float64 [rows]`: the squared delta of each row, weighed by E[x²]. `weight float64 [rows]`: the loss of a
    unit of squared error. `has_sensitivity`: whether that loss is in nats.
    """

    def __init__(
        self, base: Checkpoint, finetune: Checkpoint, plan: Plan, costs: ErrorCosts, *, whole_model: bool = False
    ) -> None:
        assert plan.rule is not None
        self._whole_model = whole_model
        self._plan, self._rule, self.name, self._role = plan, plan.rule, plan.name, plan.role
        shape, element = finetune.shape(self.name), finetune.dtype(self.name).itemsize
        self.parameters = prod(shape)
        moments = costs.moments.get(self.name)
        moment_bytes = None if moments is None else moments.float().contiguous().numpy().tobytes()
        self._arguments = (base.native, finetune.native, self.name, plan.transposed, moment_bytes)
        self.energy = _floats(_native.row_energies(*self._arguments))
        self._rows = len(self.energy)
        self._columns = matrix_shape(shape, transposed=plan.transposed)[1]
        self._replaced_bytes = self.parameters * element
        self._added_bytes = (self.parameters - self._rows * self._columns) * element
        sensitivity = costs.sensitivity.get(self.name)
        self.has_sensitivity = sensitivity is not None and len(sensitivity) >= self._rows
        if sensitivity is not None and self.has_sensitivity:
            # Energies are in units of the mean of E[x²].
            unit = 1.0 if moments is None else float(moments.double().mean())
            self.weight = sensitivity[: self._rows].double() * unit
        else:
            self.weight = self._weight_by_frequency(costs.frequencies)
        if costs.compensated and self._role != "embedding":
            self.weight = self.weight * _COMPENSATED

    def _weight_by_frequency(self, frequencies: Tensor | None) -> Tensor:
        """Weights of the rows for which a relative error of 1 costs as much as the site has weights."""
        row_frequencies = torch.ones(self._rows, dtype=torch.float64)
        if self._role != "block" and frequencies is not None and len(frequencies) >= self._rows:
            row_frequencies = frequencies[: self._rows].double()
        elif self._role != "block":
            row_frequencies = 1 / torch.arange(_ZIPF_OFFSET, self._rows + _ZIPF_OFFSET, dtype=torch.float64)
        energy = float((row_frequencies * self.energy).sum())
        return row_frequencies * (self.parameters / energy) if energy > 0 else row_frequencies

    def forms(self) -> list[Form]:
        """All forms that are considered."""
        rules = self._candidates()
        plans = [replace(self._plan, rule=rule, row_bits=()) for rule in rules]
        largest_loss = self.weight * self.energy  # of each row, without a delta
        rows, representative = sample_rows(largest_loss, max(64, _SAMPLE_WEIGHTS[self._role] // self._columns))
        errors = _native.probe(*self._arguments, rows.tolist(), [plan.to_native() for plan in plans])
        relative_errors = [_floats(raw) / self.energy[rows].clamp_min(1e-300) for raw in errors]
        losses = [largest_loss * relative[representative] for relative in relative_errors]
        forms = [self._form(plan, float(loss.sum())) for plan, loss in zip(plans, losses, strict=True)]
        for rank in sorted({rule.rank for rule in rules}):
            by_bits = {
                rule.bits: loss
                for rule, loss in zip(rules, losses, strict=True)
                if rule.rank == rank and not rule.salient and rule.group_size is None
            }
            # One bit leaves about the same share of a row's energy, whatever low-rank part was subtracted before: so
            # this is the loss of the low-rank part alone.
            without_codes = largest_loss * (by_bits[1] / losses[0].clamp_min(1e-300)).clamp(max=1.0)
            codeless = {} if self._whole_model else {0: without_codes * _COHERENCE}
            forms += self._forms_of_mixed_widths(rank, codeless | by_bits)
        return [*forms, Form(replace(self._plan, rule=None), self._weigh([("whole", self._replaced_bytes)]), 0.0)]

    def _forms_of_mixed_widths(self, rank: int, losses: dict[int, Tensor]) -> list[Form]:
        """The form without codes; for embeddings and head also forms whose rows have different widths.

        `losses`: of each row `[rows]`, by rising bits; 0 where rows may have no codes. At a price of a byte every row
        takes the width that minimises its loss plus the price of its bytes (Lagrange); a range of prices gives a range
        of forms.
        """
        plan = replace(self._plan, rule=self._candidate(1, rank), row_bits=())
        forms = []
        if 0 in losses:
            forms.append(self._form(plan, float(losses[0].sum()), torch.zeros(self._rows, dtype=torch.uint8)))
        if self._role == "block":
            return forms
        widths = torch.tensor(list(losses), dtype=torch.uint8)
        stacked = torch.stack(list(losses.values()))
        sizes = [row_bytes(bits, self._columns) + _ROW_BYTES if bits else 0 for bits in losses]
        size = torch.tensor(sizes, dtype=torch.float64)[:, None]
        highest_price = float((stacked[0] - stacked[1]).max()) / (sizes[1] - sizes[0])
        for price in torch.logspace(-7, 0, _PRICES, dtype=torch.float64) * highest_price:
            chosen = (stacked + price * size).argmin(0)
            loss = float(stacked.gather(0, chosen[None]).sum())
            forms.append(self._form(plan, loss, widths[chosen]))
        return forms

    def _candidates(self) -> list[Rule]:
        """The rules that are measured, one width for all rows. The first has 1 bit and no low-rank part."""
        block = self._role == "block"
        ranks = [rank for rank in (_RANKS if block else _ROW_RANKS) if 4 * rank <= min(self._rows, self._columns)]
        if not block:
            return [self._candidate(bits, rank) for rank in ranks for bits in BITS]
        rules = [self._candidate(bits, rank) for rank in ranks for bits in (1, 2)]
        rules += [self._candidate(bits) for bits in (3, 4, 8)]
        if self._columns > _GROUP_SIZE:
            rules += [self._candidate(bits, group_size=_GROUP_SIZE) for bits in (1, 2, 3)]
        if self._columns > 8 * _SALIENT:
            rules += [self._candidate(bits, salient=_SALIENT) for bits in (1, 2)]
        return rules

    def _candidate(self, bits: int, rank: int = 0, group_size: int | None = None, salient: int = 0) -> Rule:
        return replace(
            self._rule, bits=bits, rank=rank, group_size=group_size, salient=salient, skip_unchanged_rows=False
        )

    def _form(self, plan: Plan, loss: float, widths: Tensor | None = None) -> Form:
        """A form with its bytes: aligned tensors, and their entries in header and manifest."""
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
            tensors = [("codes.0", 0), ("scales.0", 0), ("rows.0", 0)]  # how the format writes a site without codes
        tensors += [("added", self._added_bytes)] if self._added_bytes else []
        return Form(plan, self._weigh(tensors) + 40 * len(counts), loss, widths)

    def _weigh(self, tensors: list[tuple[str, int]]) -> int:
        return weigh(self.name, tensors)


def weigh(site: str, tensors: list[tuple[str, int]]) -> int:
    """Bytes of a site's aligned tensors (role, bytes), and about those of their entries in header and manifest."""
    entries = sum(len(site) + 2 * len(role) + (185 if size % _ALIGNMENT else 115) for role, size in tensors)
    return entries + sum(-(-size // _ALIGNMENT) * _ALIGNMENT for _, size in tensors)


def _floats(raw: bytes) -> Tensor:
    """`float64 [n]` of little-endian bytes."""
    return torch.frombuffer(bytearray(raw), dtype=torch.float64)


def sample_rows(loss: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` row numbers, rising, and for every row the index of the sampled row that represents it.

    `loss float64 [rows]`. All rows if there are no more than `count`. Else half of the sample is spread evenly over the
    rows sorted by loss, and half over the sum of losses, so that rows with large losses are measured closely. The
    sampled row with the nearest place in that order represents a row.

    >>> sample_rows(torch.tensor([1.0, 9.0, 2.0, 8.0, 1.5]).double(), 4)
    (tensor([0, 1]), tensor([0, 1, 1, 1, 0]))
    """
    rows = len(loss)
    if rows <= count:
        return torch.arange(rows), torch.arange(rows)
    order = torch.argsort(loss, descending=True, stable=True)
    by_rank = torch.linspace(0, rows - 1, count // 2).round().long()
    summed = loss[order].cumsum(0)
    by_loss = torch.searchsorted(summed, torch.linspace(0, float(summed[-1]), count - count // 2).double())
    places = torch.cat([by_rank, by_loss.clamp(max=rows - 1)]).unique()
    middles = (places[1:] + places[:-1]) / 2
    nearest = torch.searchsorted(middles, torch.arange(rows, dtype=middles.dtype))
    sampled = order[places]
    rising = torch.argsort(sampled)
    index_after_sorting = torch.empty_like(rising)
    index_after_sorting[rising] = torch.arange(len(rising))
    representative = torch.empty(rows, dtype=torch.int64)
    representative[order] = index_after_sorting[nearest]
    return sampled[rising], representative
