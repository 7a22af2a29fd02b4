"""A router over the base's own hidden states that abstains to the base.

    prompts ── the base's first half of layers ── states of unit length ┬ mean over tokens ───────────────┐
                                                                        └ standard deviation over tokens ─┴ x
    x [2 · hidden] ── standardise, principal components ── z [k] ── z · W + b, over the temperature ── softmax ── scores
      └ what the components leave out ─────────────────────┴ distance to each label's centre, over its limit

A prompt goes to the base where no score reaches the threshold, or where it lies beyond every label's limit (another
domain, gibberish). Measured on the tiny family and on a 135-million-parameter model: means over tokens of unit length
beat plain means and the last token, half the depth tells experts apart as well as any layer and strangers better, and
without the deviation or what the components leave out much gibberish passes for the nearest label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch.errors import DataError, RouterError
from meswitch.expert_name import BASE
from meswitch.progress import ProgressCallback
from meswitch.router.embedding.disk import KIND, RouterContents, read_router, save_router
from meswitch.router.embedding.head import cross_validate, fit_added_label, fit_head
from meswitch.router.embedding.space import Space
from meswitch.router.protocol import BaseModel, EmbedFunction, compute, embed_prompts
from meswitch.router.route import Route, check_label

_FEWEST_PROMPTS = 4  # of a label: fewer leave nothing to hold out
_NEAR_SHARE = 0.95  # of a label's held-out prompts lie within its limit
_ROWS = 64  # of embeddings that are routed in one piece
_EXEMPLARS = 200  # prompts of a label that are kept, to fit later labels against


@dataclass(frozen=True, eq=False)
class EmbeddingRouter:
    """A fitted router, immutable. Make one with `fit`, or read one with `load`.

    `experts`: the labels, in the order of `logits`. `threshold`: the probability below which a prompt goes to the base.
    `temperature` divides the logits; `penalty` is the head's L2 penalty. `tensors`: what `disk` stores, by name.

    >>> x = torch.cat([torch.randn(20, 8) + 4, torch.randn(20, 8) - 4])
    >>> router = EmbeddingRouter.fit(x, ["code"] * 20 + ["maths"] * 20)
    >>> router.route_embeddings(x.mean(0, keepdim=True) * 0 + 4)[0].expert
    'code'
    """

    experts: tuple[str, ...]
    threshold: float
    temperature: float
    penalty: float
    tensors: dict[str, Tensor] = field(repr=False)
    base_fingerprint: str | None = None

    kind = KIND

    @classmethod
    def fit(
        cls,
        embeddings: Tensor,
        experts: Sequence[str],
        *,
        threshold: float = 0.5,
        base_fingerprint: str | None = None,
        seed: int = 0,
        progress: ProgressCallback | None = None,
    ) -> EmbeddingRouter:
        """Fit to `embeddings [n, d]` and each prompt's label; `"base"` is a label like any other.

        Penalty, temperature and limits come from five folds, drawn by `seed`. `threshold`: below this probability a
        prompt goes to the base; one half means "more likely wrong than right". `progress` counts the folds' fits.

        Raises `DataError` for fewer than two labels, or a label with fewer than four prompts; `RouterError` for
        embeddings of another shape or with a NaN, or a threshold outside 0 to 1.
        """
        if not 0 <= threshold <= 1:
            raise RouterError(f"expected a threshold from 0 to 1, found {threshold}")
        x = _check_embeddings(embeddings, len(experts)).double()
        names = tuple(sorted(set(experts)))
        _check_labels(names, experts)
        y = torch.tensor([names.index(name) for name in experts])
        held_out = cross_validate(x, y, len(names), seed, progress)
        space = Space.fit(x, y, len(names), held_out.components)
        z = space.project(x)
        weight, bias = fit_head(z, y, len(names), held_out.penalty)
        kept = torch.cat([(y == i).nonzero().squeeze(1)[:_EXEMPLARS] for i in range(len(names))])
        limits = _limits(held_out.distances, y, len(names))
        tensors = {**vars(space), "limits": limits, "weight": weight, "bias": bias, "exemplars": z[kept]}
        tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()} | {"labels": y[kept]}
        return cls(names, threshold, held_out.temperature, held_out.penalty, tensors, base_fingerprint)

    def add_expert(self, name: str, embeddings: Tensor) -> EmbeddingRouter:
        """A router that also knows `name`, from its prompts' `embeddings [n, d]`; the other labels' logits stay.

        Raises `RouterError` for a name that the router has or embeddings of another width, `DataError` for fewer than
        four prompts.
        """
        if name in self.experts:
            raise RouterError(f"expected an expert this router does not have, found {name!r}")
        x = _check_embeddings(embeddings, len(embeddings), width=self.width)
        _check_labels([*self.experts, name], [name] * len(x), counted=(name,))
        t, z = self.tensors, self._space.project(x)
        centers = torch.cat([t["centers"], z.mean(0)[None]])
        distances = replace(self._space, centers=centers).distances(x)[:, -1]
        limit = torch.maximum(distances.quantile(_NEAR_SHARE), t["limits"].min())
        weight, bias = self._fit_added_label(z)
        kept = z[:_EXEMPLARS]
        labels = torch.full((len(kept),), len(self.experts), dtype=torch.int64)
        tensors = {
            **t,
            "weight": torch.cat([t["weight"], weight[:, None]], dim=1),
            "bias": torch.cat([t["bias"], bias[None]]),
            "centers": centers,
            "limits": torch.cat([t["limits"], limit[None]]),
            "exemplars": torch.cat([t["exemplars"], kept]),
            "labels": torch.cat([t["labels"], labels]),
        }
        return replace(self, experts=(*self.experts, name), tensors=tensors)

    def _fit_added_label(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `float32 [k]` and bias of a label with the components `z [n, k]`, against the kept exemplars."""
        t = {name: self.tensors[name].double() for name in ("exemplars", "weight", "bias")}
        every = torch.cat([t["exemplars"], z.double()])
        y = torch.cat([self.tensors["labels"], torch.full((len(z),), len(self.experts))])
        weight, bias = fit_added_label(every @ t["weight"] + t["bias"], every, y, self.penalty)
        return weight.float(), bias.float()

    @property
    def width(self) -> int:
        """Entries of an embedding."""
        return int(self.tensors["mean"].shape[0])

    @property
    def _space(self) -> Space:
        return Space(**{entry.name: self.tensors[entry.name] for entry in fields(Space)})

    def logits(self, embeddings: Tensor) -> Tensor:
        """Before the temperature, `float32 [n, labels]`."""
        return self._space.project(embeddings) @ self.tensors["weight"] + self.tensors["bias"]

    def distances(self, embeddings: Tensor) -> Tensor:
        """To the nearest label, over its limit, `float32 [n]`; beyond 1 is unlike any prompt of the training."""
        return (self._space.distances(embeddings) / self.tensors["limits"]).amin(dim=1)

    def route(self, prompts: Sequence[str], base: BaseModel | EmbedFunction) -> list[Route]:
        """Where each prompt goes; `base` is the one this router was made for, or its `embed` alone."""
        routes: list[Route] = []
        for rows in embed_prompts(base, prompts).split(_ROWS) if prompts else ():
            routes += compute(base, partial(self.route_embeddings, rows))
        return routes

    def route_embeddings(self, embeddings: Tensor) -> list[Route]:
        """Where each row of `embeddings [n, d]` goes. Raises `RouterError` for another width, or a NaN."""
        x = _check_embeddings(embeddings, len(embeddings), width=self.width)
        probabilities = (self.logits(x) / self.temperature).softmax(dim=-1).tolist()
        routes = []
        for row, distance in zip(probabilities, self.distances(x).tolist(), strict=True):
            scores = dict(zip(self.experts, row, strict=True))
            likeliest = max(scores, key=scores.__getitem__)
            abstained = scores[likeliest] < self.threshold or distance > 1
            routes.append(Route(BASE if abstained else likeliest, scores, abstained))
        return routes

    def summary(self) -> dict[str, Any]:
        """`{"kind", "experts", "temperature", "threshold"}`."""
        numbers = {"temperature": self.temperature, "threshold": self.threshold}
        return {"kind": self.kind, "experts": list(self.experts), **numbers}

    def save(self, path: str | Path) -> None:
        """Write `router.json` and `router.safetensors` into the folder `path`, replacing a router that is there.

        The folder appears complete or not at all. Raises `RouterError` where `path` is something other than a router.
        """
        names = RouterContents._fields
        save_router(Path(path), RouterContents(**{name: getattr(self, name) for name in names}))

    @classmethod
    def load(cls, path: str | Path, base_fingerprint: str | None = None) -> EmbeddingRouter:
        """Read what `save` wrote; with `base_fingerprint`, it must be the base's that the router was made for.

        Raises `RouterError` for a router that is missing, malformed, changed on disk, or another base's.
        """
        return cls(*read_router(Path(path), base_fingerprint))


def _limits(distances: Tensor, y: Tensor, count: int) -> Tensor:
    """For each label, how far from its centre a prompt may lie: most of its held-out prompts do, and most of all."""
    everywhere = distances.quantile(_NEAR_SHARE)
    return torch.stack([torch.maximum(distances[y == i].quantile(_NEAR_SHARE), everywhere) for i in range(count)])


def _check_embeddings(embeddings: Tensor, count: int, *, width: int | None = None) -> Tensor:
    """The embeddings as `float32` on the CPU; raises `RouterError` unless they are finite and `[count, width]`."""
    if embeddings.dim() != 2 or len(embeddings) != count or (width is not None and embeddings.shape[1] != width):
        expected = f"[{count}, {'d' if width is None else width}]"
        raise RouterError(
            f"expected embeddings of shape {expected}, found {list(embeddings.shape)}",
            hint="the router was made for a base of another width",
        )
    x = embeddings.detach().float().cpu()
    if not x.isfinite().all():
        raise RouterError("expected finite embeddings, found NaN or infinity")
    return x


def _check_labels(names: Sequence[str], labels: Sequence[str], counted: Sequence[str] | None = None) -> None:
    """Raises `DataError` for fewer than two names, and for one that is `counted` (all by default) with too few `labels`
    or that no expert may have."""
    if len(names) < 2:
        raise DataError(
            f"expected prompts of at least two experts, found {', '.join(names) or 'none'}",
            hint=f"prompts that no expert should get may be labelled {BASE!r}",
        )
    for name in names if counted is None else counted:
        check_label(name, "a label of the router")
        count = list(labels).count(name)
        if count < _FEWEST_PROMPTS:
            raise DataError(f"expected at least {_FEWEST_PROMPTS} prompts for each expert, found {count} for {name!r}")
