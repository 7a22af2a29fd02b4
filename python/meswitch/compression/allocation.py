"""Allocation: the form in which each site is stored, so that the delta takes at most a target of bytes and loses least.

    every site ── probe: the error each candidate leaves in some rows, × sensitivity ── forms: bytes and loss
                                                                                         └ lower hull of each site
    all sites ── steps down their hulls, the largest loss a byte first, until the target is reached

A *form* is a way to store one site, with its bytes and its loss. Only forms on the lower convex hull of loss against
bytes can be optimal. Sites that are shared with the base take no bytes and have no forms.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meswitch.compression.forms import CandidateSite, ErrorCosts, Form
from meswitch.compression.plan import Plan
from meswitch.errors import BudgetError
from meswitch.huggingface.checkpoint import Checkpoint


@dataclass(frozen=True)
class Allocation:
    """All plans, the form chosen for each site that had a choice, and the bytes of the delta, at most."""

    plans: list[Plan]
    forms: dict[str, Form]
    bytes: int

    @property
    def uncounted(self) -> int:
        """Bytes that belong to no site, and the error of the forms' own estimates."""
        return self.bytes - sum(form.bytes for form in self.forms.values())

    @property
    def loss(self) -> float:
        """The predicted loss: in nats a token where sensitivity was measured, else in an arbitrary unit."""
        return sum(form.loss for form in self.forms.values())

    def summary(self) -> list[dict[str, Any]]:
        """`{role, form, sites, bytes_share, loss_share}` of each role and form; shares of all sites with a form."""
        size, loss = sum(form.bytes for form in self.forms.values()), self.loss
        groups: dict[tuple[str, str], list[Form]] = {}
        for form in self.forms.values():
            groups.setdefault((form.plan.role, form.kind), []).append(form)
        return [
            {
                "role": role,
                "form": kind,
                "sites": len(forms),
                "bytes_share": round(sum(form.bytes for form in forms) / size, 4) if size else 0.0,
                "loss_share": round(sum(form.loss for form in forms) / loss, 4) if loss else 0.0,
            }
            for (role, kind), forms in sorted(groups.items())
        ]


def allocate(
    base: Checkpoint,
    finetune: Checkpoint,
    plans: Sequence[Plan],
    shared: Container[str],
    costs: ErrorCosts,
    target: int,
    weigh: Callable[[Allocation], int],
    progress: Callable[[str, int, int], None],
    *,
    whole_model: bool = False,
) -> Allocation:
    """Chooses a form for every site so that the whole delta takes at most `target` bytes, as `weigh` counts them.

    `plans` without a rule, and those whose names are in `shared` (the base's own), stay as they are. `progress` gets a
    site's name, the weights done and all weights. `whole_model`: sites are weights and no deltas. Equal arguments make
    equal choices.

    Raises `BudgetError` if even the smallest forms take more, with the bytes that they need; `NonFiniteError`.
    """
    sites = [
        CandidateSite(base, finetune, plan, costs, whole_model=whole_model)
        for plan in plans
        if plan.rule is not None and plan.name not in shared
    ]
    hulls = _measure_hulls(sites, progress)

    def allocation(chosen: dict[str, Form]) -> Allocation:
        final = [chosen[plan.name].final_plan() if plan.name in chosen else plan for plan in plans]
        unweighed = Allocation(final, chosen, 0)
        return replace(unweighed, bytes=weigh(unweighed))

    smallest = allocation({name: forms[0] for name, forms in hulls.items()})
    if smallest.bytes > target:
        raise BudgetError(
            f"expected a target of at least {smallest.bytes:,} bytes, found {target:,}",
            hint="that is every matrix in its smallest form; vectors are stored whole",
            least=smallest.bytes,
        )
    first = _fit(target, hulls, smallest.uncounted, allocation)
    second = _fit(target, hulls, first.uncounted, allocation)  # with a better estimate of uncounted bytes
    return min(first, second, key=lambda candidate: candidate.loss)


def _measure_hulls(sites: list[CandidateSite], progress: Callable[[str, int, int], None]) -> dict[str, list[Form]]:
    """The hull of the forms of every site that has a choice, by name."""
    _scale_unknown_losses(sites)
    hulls, done, total = {}, 0, sum(site.parameters for site in sites)
    for site in sites:
        progress(site.name, done, total)
        hulls[site.name] = hull(site.forms())
        done += site.parameters
    progress("", done, total)
    return hulls


def _fit(
    target: int, hulls: dict[str, list[Form]], uncounted: int, allocation: Callable[[dict[str, Form]], Allocation]
) -> Allocation:
    """The best choice within `target` bytes, of which about `uncounted` belong to no site; more are found by trial."""
    while True:
        candidate = allocation(choose(hulls, target - uncounted))
        if candidate.bytes <= target or all(candidate.forms[name] is forms[0] for name, forms in hulls.items()):
            return candidate
        uncounted += candidate.bytes - target


def _scale_unknown_losses(sites: list[CandidateSite]) -> None:
    """Gives sites without sensitivity (MoE experts of a form of their own) the mean loss a weight of the others."""
    measured = [site for site in sites if site.has_sensitivity]
    if measured:
        mean = sum(float((site.weight * site.energy).sum()) for site in measured) / sum(s.parameters for s in measured)
        for site in sites:
            if not site.has_sensitivity:
                site.weight *= mean


def hull(forms: Sequence[Form]) -> list[Form]:
    """The forms on the lower convex hull of loss against bytes, which no mixture of two others beats, smallest first.

    >>> costs = [(10, 8.0), (20, 7.0), (30, 2.0), (35, 3.0), (40, 1.5)]
    >>> forms = [Form(Plan("w"), bytes, loss) for bytes, loss in costs]
    >>> [form.bytes for form in hull(forms)]
    [10, 30, 40]
    """
    corners: list[Form] = []
    for form in sorted(forms, key=lambda form: (form.bytes, form.loss)):
        if corners and form.loss >= corners[-1].loss:
            continue
        while len(corners) > 1 and _gain(corners[-2], corners[-1]) <= _gain(corners[-2], form):
            corners.pop()
        corners.append(form)
    return corners


def _gain(smaller: Form, larger: Form) -> float:
    """Loss that is saved a byte."""
    return (smaller.loss - larger.loss) / max(larger.bytes - smaller.bytes, 1)


def choose(hulls: dict[str, list[Form]], budget: int) -> dict[str, Form]:
    """A form for each site, with little loss and at most `budget` bytes in all, if the smallest forms take no more.

    Greedy: steps along all hulls in order of their gain, until one does not fit. The bytes left go to the one site
    whose loss they reduce most. A larger budget never gives a larger loss.

    >>> forms = [Form(Plan("w"), 10, 8.0), Form(Plan("w"), 30, 2.0), Form(Plan("w"), 40, 1.5)]
    >>> [form.bytes for form in choose({"a": forms, "b": forms}, 75).values()]
    [40, 30]
    """
    steps = sorted(
        (-_gain(forms[number - 1], forms[number]), name, number)
        for name, forms in hulls.items()
        for number in range(1, len(forms))
    )
    chosen = {name: forms[0] for name, forms in hulls.items()}
    left = budget - sum(form.bytes for form in chosen.values())
    for _, name, number in steps:
        more = hulls[name][number].bytes - chosen[name].bytes
        if more > left:
            break
        chosen[name], left = hulls[name][number], left - more
    last_steps = [
        (form.loss - chosen[name].loss, name, form.bytes)
        for name, forms in hulls.items()
        for form in forms
        if 0 < form.bytes - chosen[name].bytes <= left
    ]
    if last_steps:
        _, name, size = min(last_steps)
        chosen[name] = next(form for form in hulls[name] if form.bytes == size)
    return chosen
