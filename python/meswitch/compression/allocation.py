"""Bits where they matter: how each site is stored so that a whole delta weighs at most a target and loses least.

    every site ── probe: the error each candidate leaves in some rows, × sensitivity ── forms: bytes and loss
                                                                                         └ lower hull of each site
    all sites ── steps down their hulls, the largest loss a byte first, until the target is reached

A *form* is a way to store one site. Embeddings and head also have forms that give each row its own bits: the rows' own
trade of loss against bytes at a price, for a range of prices (Lagrange). Sites that are bit-equal cost nothing and have
no forms.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meswitch.compression.forms import Costs, Form, OpenSite
from meswitch.compression.plan import Plan
from meswitch.errors import BudgetError
from meswitch.huggingface.checkpoint import Checkpoint


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
            groups.setdefault((form.plan.role, form.kind), []).append(form)
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


def allocate(
    base: Checkpoint,
    finetune: Checkpoint,
    plans: Sequence[Plan],
    shared: Container[str],
    costs: Costs,
    target: int,
    weigh: Callable[[Allocation], int],
    progress: Callable[[str, int, int], None],
) -> Allocation:
    """Chooses how every site is stored so that `weigh` finds at most `target` bytes.

    `plans` without a rule, and those whose names are in `shared` (bit-equal to the base), stay as they are. `progress`
    gets a site's name, weights done and in all. The same arguments make the same choice.

    Raises `BudgetError` where even the smallest forms are too much, with the bytes they need; `NonFiniteError`.
    """
    open_plans = [plan for plan in plans if plan.rule is not None and plan.name not in shared]
    sites = [OpenSite(base, finetune, plan, costs) for plan in open_plans]
    _compare(sites)
    menus, done, total = {}, 0, sum(site.parameters for site in sites)
    for site in sites:
        progress(site.name, done, total)
        menus[site.name] = hull(site.forms())
        done += site.parameters
    progress("", done, total)

    def outcome(chosen: dict[str, Form]) -> Allocation:
        made = [chosen[plan.name].finished() if plan.name in chosen else plan for plan in plans]
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


def _compare(sites: list[OpenSite]) -> None:
    """Gives sites without sensitivity (MoE experts that transformers fuses) the others' mean loss a weight."""
    known = [site for site in sites if site.known]
    if known:
        mean = sum(float((site.weight * site.energy).sum()) for site in known) / sum(s.parameters for s in known)
        for site in sites:
            if not site.known:
                site.weight *= mean


def hull(forms: Sequence[Form]) -> list[Form]:
    """The forms that no mixture of two others beats: from the smallest on, each losing less, at falling gains a byte.

    >>> costs = [(10, 8.0), (20, 7.0), (30, 2.0), (35, 3.0), (40, 1.5)]
    >>> forms = [Form(Plan("w"), bytes, loss) for bytes, loss in costs]
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

    >>> menu = [Form(Plan("w"), 10, 8.0), Form(Plan("w"), 30, 2.0), Form(Plan("w"), 40, 1.5)]
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
