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

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn.functional import cross_entropy

from meswitch.errors import DataError, RouterError
from meswitch.router.embedding.disk import (
    FORMAT_VERSION,
    _check_shapes,
    _check_target,
    _read_tensors,
    _write,
    read_manifest,
)
from meswitch.router.embedding.head import Space, cross_validate, fit_head, minimise
from meswitch.router.embedding.pooling import Embed
from meswitch.router.route import BASE, Example, Route, report

_FEWEST = 4  # prompts a label: fewer leave nothing to hold out
_NEAR = 0.95  # share of a label's held-out prompts that lie within its limit
_EXEMPLARS = 200  # prompts a label kept to fit later labels against


@dataclass(frozen=True, eq=False)
class EmbeddingRouter:
    """A fitted router. Make one with `fit`, or read one with `load`.

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

    kind = "embedding"

    @classmethod
    def fit(
        cls,
        embeddings: Tensor,
        experts: Sequence[str],
        *,
        threshold: float = 0.5,
        base_fingerprint: str | None = None,
        seed: int = 0,
    ) -> EmbeddingRouter:
        """Fit to `embeddings [n, d]` and each prompt's label; `"base"` is a label like any other.

        Penalty, temperature and limits come from five folds. `threshold`: below this probability a prompt goes to the
        base; one half means "more likely wrong than right".

        Raises `DataError` for fewer than two labels, or a label with fewer than four prompts.
        """
        if not 0 <= threshold <= 1:
            raise RouterError(f"expected a threshold from 0 to 1, found {threshold}")
        x = _checked(embeddings, len(experts)).double()
        names = tuple(sorted(set(experts)))
        _check_labels(names, experts)
        y = torch.tensor([names.index(name) for name in experts])
        held = cross_validate(x, y, len(names), seed)
        space = Space.fit(x, y, len(names), held.components)
        z = space(x)
        weight, bias = fit_head(z, y, len(names), held.penalty)
        everywhere = held.distances.quantile(_NEAR)
        limits = [torch.maximum(held.distances[y == i].quantile(_NEAR), everywhere) for i in range(len(names))]
        kept = torch.cat([(y == i).nonzero().squeeze(1)[:_EXEMPLARS] for i in range(len(names))])
        tensors = {
            **vars(space),
            "limits": torch.stack(limits),
            "weight": weight,
            "bias": bias,
            "exemplars": z[kept],
        }
        tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()} | {"labels": y[kept]}
        return cls(names, threshold, held.temperature, held.penalty, tensors, base_fingerprint)

    def add_expert(self, name: str, embeddings: Tensor) -> EmbeddingRouter:
        """A router that also knows `name`, from its prompts' `embeddings [n, d]`; the other labels' logits stay."""
        if name in self.experts:
            raise RouterError(f"expected an expert this router does not have, found {name!r}")
        x = _checked(embeddings, len(embeddings), width=self.width)
        _check_labels([*self.experts, name], [name] * len(x), fewest_of=(name,))
        t, z = self.tensors, self._space(x)
        center = z.mean(0)
        centers = torch.cat([t["centers"], center[None]])
        limit = torch.maximum(
            replace(self._space, centers=centers).distances(x)[:, -1].quantile(_NEAR), t["limits"].min()
        )
        weight, bias = self._fit_row(z)
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

    def _fit_row(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """The new label's weights, with the others' held as they are."""
        t = {name: tensor.double() for name, tensor in self.tensors.items() if name != "labels"}
        z = torch.cat([t["exemplars"], new.double()])
        y = torch.cat([self.tensors["labels"], torch.full((len(new),), len(self.experts))])
        share = torch.bincount(y).clamp_min(1).double().reciprocal()
        frozen = z @ t["weight"] + t["bias"]
        weight = torch.zeros(z.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros((), dtype=torch.float64, requires_grad=True)

        def loss() -> Tensor:
            logits = torch.cat([frozen, (z @ weight + bias)[:, None]], dim=1)
            return cross_entropy(logits, y, weight=share) + self.penalty / 2 * weight.square().sum()

        minimise([weight, bias], loss)
        return weight.detach().float(), bias.detach().float()

    @property
    def width(self) -> int:
        """Entries of an embedding."""
        return int(self.tensors["mean"].shape[0])

    @property
    def _space(self) -> Space:
        return Space(**{entry.name: self.tensors[entry.name] for entry in fields(Space)})

    def logits(self, embeddings: Tensor) -> Tensor:
        """Before the temperature, `float32 [n, labels]`."""
        return self._space(embeddings) @ self.tensors["weight"] + self.tensors["bias"]

    def distances(self, embeddings: Tensor) -> Tensor:
        """To the nearest label, over its limit, `float32 [n]`; beyond 1 is unlike anything seen."""
        return (self._space.distances(embeddings) / self.tensors["limits"]).amin(dim=1)

    def route(self, prompts: Sequence[str], embed: Embed) -> list[Route]:
        """Where each prompt goes; `embed` runs the base this router was made for."""
        return self.route_embeddings(embed(list(prompts))) if prompts else []

    def route_embeddings(self, embeddings: Tensor) -> list[Route]:
        """Where each row of `embeddings [n, d]` goes."""
        x = _checked(embeddings, len(embeddings), width=self.width)
        scores = (self.logits(x) / self.temperature).softmax(dim=-1).tolist()
        routes = []
        for row, distance in zip(scores, self.distances(x).tolist(), strict=True):
            named = dict(zip(self.experts, row, strict=True))
            likeliest = max(named, key=named.__getitem__)
            abstained = named[likeliest] < self.threshold or distance > 1
            routes.append(Route(BASE if abstained else likeliest, named, abstained))
        return routes

    def evaluate(self, examples: Sequence[Example], embed: Embed) -> dict[str, Any]:
        """`router.report` over labelled prompts."""
        return report(examples, self.route([example.prompt for example in examples], embed))

    # --- on disk --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write `router.json` and `router.safetensors` into the folder `path`, replacing a router that is there.

        The folder appears whole or not at all. Raises `RouterError` where `path` is something else than a router.
        """
        path = Path(path)
        _check_target(path)
        blob = save_tensors(self.tensors)
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "base_fingerprint": self.base_fingerprint,
            "experts": self.experts,
            "threshold": self.threshold,
            "temperature": self.temperature,
            "penalty": self.penalty,
            "sha256": hashlib.sha256(blob).hexdigest(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            new = staging / "new"
            new.mkdir()
            _write(new / "router.safetensors", blob)
            _write(new / "router.json", (json.dumps(manifest, indent=2) + "\n").encode())
            if path.exists():
                path.rename(staging / "old")
            new.rename(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @classmethod
    def load(cls, path: str | Path, base_fingerprint: str | None = None) -> EmbeddingRouter:
        """Read what `save` wrote; with `base_fingerprint`, it must be the base's that the router was made for.

        Raises `RouterError` for a router that is missing, malformed, changed on disk, or another base's.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.get("kind") != cls.kind:
            raise RouterError(f"expected a router of kind 'embedding', found {manifest.get('kind')!r}: {path}")
        found = manifest.get("base_fingerprint")
        if base_fingerprint is not None and found != base_fingerprint:
            raise RouterError(
                f"expected a router for base {base_fingerprint}, found one for {found}: {path}",
                hint="train the router again on this base: meswitch router train",
            )
        tensors = _read_tensors(path / "router.safetensors", manifest.get("sha256"))
        try:
            experts = tuple(str(name) for name in manifest["experts"])
            numbers = [float(manifest[name]) for name in ("threshold", "temperature", "penalty")]
        except (KeyError, TypeError, ValueError) as error:
            raise RouterError(f"expected experts and numbers, found {error!r}: {path / 'router.json'}") from error
        if not (0 <= numbers[0] <= 1 and numbers[1] > 0 and all(map(math.isfinite, numbers))):
            raise RouterError(f"expected a threshold and a temperature, found {numbers}: {path / 'router.json'}")
        _check_shapes(tensors, len(experts), path / "router.safetensors")
        return cls(experts, numbers[0], numbers[1], numbers[2], tensors, found)


def _checked(embeddings: Tensor, count: int, *, width: int | None = None) -> Tensor:
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


def _check_labels(names: Sequence[str], labels: Sequence[str], fewest_of: Sequence[str] | None = None) -> None:
    if len(names) < 2:
        raise DataError(
            f"expected prompts of at least two experts, found {', '.join(names) or 'none'}",
            hint=f"prompts that no expert should get may be labelled {BASE!r}",
        )
    for name in names if fewest_of is None else fewest_of:
        found = list(labels).count(name)
        if found < _FEWEST:
            raise DataError(f"expected at least {_FEWEST} prompts for each expert, found {found} for {name!r}")
