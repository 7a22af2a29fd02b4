"""The trainable scales of one site: stored value · exp(shift), with the codes fixed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from meswitch.site import DeltaSite, Part, QuantizedSite, Site

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # positive numbers of float16


class TrainableScales:
    """The scales of one site by role: what is stored, and by how much the logarithm of each has shifted.

    Roles are those of the file format: `scales.0`, `scales.1`, … of the parts, `column_scales`, and `u`. Stored values
    are float32 in units of 2**exponent. `shifts` are the parameters to train; they start at 0.
    """

    def __init__(self, site: DeltaSite) -> None:
        self.site = site
        self.parts: tuple[Part, ...] = ()
        self.stored: dict[str, Tensor] = {}
        if isinstance(site, QuantizedSite):
            self.parts = site.parts
            self.stored |= {f"scales.{number}": part.scales.float() for number, part in enumerate(site.parts)}
            if site.column_scales is not None:
                self.stored["column_scales"] = site.column_scales.float()
        if site.low_rank is not None:
            self.stored["u"] = site.low_rank.u.float()
        self.shifts = {role: nn.Parameter(torch.zeros_like(value)) for role, value in self.stored.items()}

    @property
    def has_codes(self) -> bool:
        """Whether the site has codes; only such sites are trained."""
        return bool(self.parts)

    def rounded(self, role: str) -> Tensor:
        """The scales of a role as they are stored: float16; a scale that was not 0 becomes neither 0 nor infinite."""
        value = self.stored[role] * self.shifts[role].detach().exp()
        magnitude = value.abs().clamp(_SMALLEST, _LARGEST)
        return torch.where(value == 0, value, magnitude.copysign(value)).half()

    def value(self, role: str, *, rounded: bool) -> Tensor:
        """The scales of a role in float32: as stored if `rounded`, else differentiable by the shifts."""
        return self.rounded(role).float() if rounded else self.stored[role] * self.shifts[role].exp()

    def tensors(self) -> dict[str, Tensor]:
        """All scales as they are stored, by `SITE/ROLE`."""
        return {f"{self.site.name}/{role}": self.rounded(role) for role in self.stored}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes stored scales from `tensors`, as `tensors()` returned them, and sets the shifts to 0."""
        for role, shift in self.shifts.items():
            self.stored[role] = tensors[f"{self.site.name}/{role}"].float()
            shift.zero_()


def trainable_scales(sites: Iterable[Site]) -> dict[str, TrainableScales]:
    """The scales of every site that has a delta, by the site's name."""
    return {site.name: TrainableScales(site) for site in sites if isinstance(site, DeltaSite)}
