"""The embedding router: the base's own hidden states, a linear head, and two reasons to abstain.

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
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from meswitch.calibration import Progress, token_ids
from meswitch.errors import DataError, RequestError, RouterError
from meswitch.router.route import BASE, Example, Route, report

Embed = Callable[[list[str]], Tensor]
"""Prompts to their embeddings, `float32 [n, 2 · hidden]`: `embed` with the base and its tokenizer filled in."""

FORMAT_VERSION = 1
MAX_TOKENS = 512
_BATCH_TOKENS = 2048
_COMPONENTS = 128
_FOLDS = 5
_FEWEST = 4  # prompts a label: fewer leave nothing to hold out
_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_SHRINKAGE = 0.3
_NEAR = 0.95  # share of a label's held-out prompts that lie within its limit
_EXEMPLARS = 200  # prompts a label kept to fit later labels against
_TENSORS = (
    "mean",
    "scale",
    "components",
    "whitening",
    "left",
    "centers",
    "limits",
    "weight",
    "bias",
    "exemplars",
    "labels",
)


# --- embeddings ---------------------------------------------------------------------------------------------------


def embed(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> Tensor:
    """What the base makes of each prompt, `float32 [n, 2 · hidden]`.

    `model` is a causal language model of transformers, also one switched to continuous batching, with no expert active;
    only half of its layers run. Of a prompt beyond `max_tokens` the first and the last half of that are read: what
    is asked stands at an end. Prompts run in padded batches of about 2,048 tokens.

    Raises `RequestError` for an empty prompt.
    """
    ids = [_prompt_ids(prompt, tokenizer, max_tokens) for prompt in prompts]
    out = torch.empty(len(ids), 2 * model.get_input_embeddings().embedding_dim)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    done = 0
    with _plain_attention(model), torch.no_grad():
        while order:
            # From the longest, so that a prompt runs beside others of about its length.
            batch = order[-max(1, _BATCH_TOKENS // len(ids[order[-1]])) :]
            del order[-len(batch) :]
            out[batch] = _pooled(model, [ids[i] for i in batch])
            done += len(batch)
            if progress is not None:
                progress(done, len(ids))
    return out


def _prompt_ids(prompt: str, tokenizer: Any, max_tokens: int) -> list[int]:
    ids = token_ids(prompt, tokenizer)
    if not prompt.strip() or not ids:
        raise RequestError("expected a prompt to route, found an empty one")
    return ids if len(ids) <= max_tokens else ids[: max_tokens // 2] + ids[-(max_tokens - max_tokens // 2) :]


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """`paged|eager` needs the paged cache; its plain form is `eager`. Continuous batching's `sdpa` is plain."""
    name = model.config._attn_implementation
    if not str(name).startswith("paged|"):
        yield
        return
    model.set_attn_implementation(name.removeprefix("paged|"))
    try:
        yield
    finally:
        model.set_attn_implementation(name)


def _pooled(model: Any, prompts: Sequence[list[int]]) -> Tensor:
    """Padded on the right, where a causal model's earlier tokens cannot see."""
    length = max(map(len, prompts))
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([p + [0] * (length - len(p)) for p in prompts], device=device)
    mask = torch.tensor([[1] * len(p) + [0] * (length - len(p)) for p in prompts], device=device)
    weight = (mask / mask.sum(1, keepdim=True)).float()[:, :, None]
    states = normalize(_halfway(model, ids, mask).float(), dim=-1)
    mean = (states * weight).sum(1)
    deviation = ((states - mean[:, None]).square() * weight).sum(1).sqrt()
    return torch.cat([mean, deviation], dim=1).cpu()


class _Enough(Exception):
    """Raised by a hook to leave a forward pass whose later layers nobody needs."""


def _halfway(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The hidden states after the first half of the layers, `[n, length, hidden]`."""
    decoder = model.base_model
    count = model.config.get_text_config().num_hidden_layers
    wanted = math.ceil(count / 2)
    layers = next((m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count), None)
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if layers is None:
        states: Tensor = decoder(**inputs, output_hidden_states=True, return_dict=True).hidden_states[wanted]
        return states
    seen: list[Tensor] = []

    def leave(_: Any, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    handle = layers[wanted - 1].register_forward_hook(leave)
    try:
        decoder(**inputs)
    except _Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


# --- the head -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Space:
    """Standardised principal components of embeddings, and distances in them and beside them."""

    mean: Tensor  # [d]
    scale: Tensor  # [d]
    components: Tensor  # [d, k], orthonormal
    whitening: Tensor  # [k, k]: ‖(z - c)·W‖ is the Mahalanobis distance within labels
    left: Tensor  # []: mean square of what the components leave out of an embedding
    centers: Tensor  # [labels, k]

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, count: int, k: int) -> _Space:
        mean, scale = x.mean(0), x.std(0, correction=0) + 1e-6
        standard = (x - mean) / scale / math.sqrt(x.shape[1])
        components = _principal(standard, k)
        z = standard @ components
        centers = torch.stack([z[y == label].mean(0) for label in range(count)])
        left = (standard.square().sum(1) - z.square().sum(1)).mean().clamp_min(1e-12)
        return cls(mean, scale, components, _whitening(z - centers[y]), left, centers)

    def __call__(self, x: Tensor) -> Tensor:
        return self._standard(x) @ self.components

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale / math.sqrt(x.shape[1])

    def distances(self, x: Tensor) -> Tensor:
        """To every label's centre, `[n, labels]`."""
        standard = self._standard(x)
        z = standard @ self.components
        beside = (standard - z @ self.components.T).square().sum(1) / self.left * z.shape[1]
        within = (z @ self.whitening)[:, None] - self.centers @ self.whitening
        return (within.square().sum(2) + beside[:, None]).sqrt()


def _principal(x: Tensor, count: int) -> Tensor:
    """The first principal directions of centred rows, `[d, count]`, through the smaller of the two Gram matrices."""
    if x.shape[0] >= x.shape[1]:
        directions: Tensor = torch.linalg.eigh(x.T @ x)[1][:, -count:]
    else:
        directions = x.T @ torch.linalg.eigh(x @ x.T)[1][:, -count:]
    return normalize(directions, dim=0)


def _whitening(spread: Tensor) -> Tensor:
    """From `spread [n, k]`, embeddings less their label's centre: an inverse root of their shrunken covariance."""
    covariance = spread.T @ spread / len(spread)
    floor = covariance.diagonal().mean().clamp_min(1e-12)
    covariance = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * floor * torch.eye(len(covariance), dtype=spread.dtype)
    root: Tensor = torch.linalg.inv(torch.linalg.cholesky(covariance))
    return root.T.contiguous()


def _fit_head(z: Tensor, y: Tensor, count: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with an L2 penalty: W `[k, count]`, b `[count]`."""
    weight = torch.zeros(z.shape[1], count, dtype=z.dtype, requires_grad=True)
    bias = torch.zeros(count, dtype=z.dtype, requires_grad=True)
    # Each label weighs the same, however many prompts it has.
    share = torch.bincount(y, minlength=count).clamp_min(1).to(z.dtype).reciprocal()
    _minimise(
        [weight, bias],
        lambda: cross_entropy(z @ weight + bias, y, weight=share) + penalty / 2 * weight.square().sum(),
    )
    return weight.detach(), bias.detach()


def _minimise(parameters: list[Tensor], loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    # Thousands of tiny products: handing each to several threads costs far more than it saves.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            optimizer.step(closure)
    finally:
        torch.set_num_threads(threads)


def _folds(y: Tensor, seed: int) -> Tensor:
    """A fold for each prompt, every label spread evenly over them."""
    generator = torch.Generator().manual_seed(seed)
    folds = torch.empty_like(y)
    for label in range(int(y.max()) + 1):
        index = (y == label).nonzero().squeeze(1)
        folds[index[torch.randperm(len(index), generator=generator)]] = torch.arange(len(index)) % _FOLDS
    return folds


@dataclass(frozen=True)
class _HeldOut:
    """What the folds' heads say of prompts they have not seen."""

    components: int
    penalty: float
    temperature: float
    distances: Tensor  # [n], to the prompt's own centre


def _cross_validate(x: Tensor, y: Tensor, count: int, seed: int) -> _HeldOut:
    folds = _folds(y, seed)
    # A third of what the folds' prompts can span, in every fit: what is left must mean something on prompts never seen.
    k = min(_COMPONENTS, max(count, len(y) * (_FOLDS - 1) // _FOLDS // 3), x.shape[1])
    logits = torch.zeros(len(_PENALTIES), len(y), count, dtype=x.dtype)
    distances = torch.zeros(len(y), dtype=x.dtype)
    for fold in range(_FOLDS):
        out = folds == fold
        if not out.any():
            continue
        space = _Space.fit(x[~out], y[~out], count, k)
        z, held = space(x[~out]), space(x[out])
        distances[out] = space.distances(x[out]).gather(1, y[out][:, None]).squeeze(1)
        for row, penalty in enumerate(_PENALTIES):
            weight, bias = _fit_head(z, y[~out], count, penalty)
            logits[row, out] = held @ weight + bias
    fits = [(_temperature(rows, y), rows, penalty) for rows, penalty in zip(logits, _PENALTIES, strict=True)]
    temperature, _, penalty = min(fits, key=lambda fit: float(cross_entropy(fit[1] / fit[0], y)))
    return _HeldOut(k, penalty, temperature, distances)


def _temperature(logits: Tensor, y: Tensor) -> float:
    """What the logits are divided by for the held-out likelihood to be highest."""
    log = torch.zeros((), dtype=logits.dtype, requires_grad=True)
    # The penalty keeps it finite where every held-out prompt is right.
    _minimise([log], lambda: cross_entropy(logits / log.exp(), y) + 0.01 * log.square())
    return float(log.detach().exp())


# --- the router ---------------------------------------------------------------------------------------------------


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
        held = _cross_validate(x, y, len(names), seed)
        space = _Space.fit(x, y, len(names), held.components)
        z = space(x)
        weight, bias = _fit_head(z, y, len(names), held.penalty)
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

        _minimise([weight, bias], loss)
        return weight.detach().float(), bias.detach().float()

    @property
    def width(self) -> int:
        """Entries of an embedding."""
        return int(self.tensors["mean"].shape[0])

    @property
    def _space(self) -> _Space:
        return _Space(**{entry.name: self.tensors[entry.name] for entry in fields(_Space)})

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


def read_manifest(path: Path) -> dict[str, Any]:
    """`router.json` of a router's folder; raises `RouterError` where it is missing, malformed or of a later version."""
    file = path / "router.json"
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RouterError(f"expected a router, found no router.json: {path}", hint="meswitch router train") from error
    except (ValueError, RecursionError) as error:
        raise RouterError(f"expected JSON, found {error}: {file}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise RouterError(f"expected format version {FORMAT_VERSION}, found {version!r}: {file}")
    assert isinstance(manifest, dict)
    return manifest


def _read_tensors(file: Path, digest: Any) -> dict[str, Tensor]:
    try:
        blob = file.read_bytes()
    except FileNotFoundError as error:
        raise RouterError(f"expected router.safetensors, found none: {file}") from error
    found = hashlib.sha256(blob).hexdigest()
    if found != digest:
        raise RouterError(f"expected sha256 {digest}, found {found}: {file}", hint="the file was changed or cut short")
    try:
        return load_tensors(blob)
    except SafetensorError as error:
        raise RouterError(f"expected a safetensors file, found {error}: {file}") from error


def _check_shapes(tensors: dict[str, Tensor], count: int, file: Path) -> None:
    if set(tensors) != set(_TENSORS) or tensors["components"].dim() != 2 or tensors["exemplars"].dim() != 2:
        raise RouterError(f"expected tensors {', '.join(_TENSORS)}, found {', '.join(sorted(tensors))}: {file}")
    width, k = tensors["components"].shape
    m = tensors["exemplars"].shape[0]
    shapes: dict[str, tuple[int, ...]] = {
        "mean": (width,),
        "scale": (width,),
        "components": (width, k),
        "weight": (k, count),
        "bias": (count,),
        "whitening": (k, k),
        "left": (),
        "centers": (count, k),
        "limits": (count,),
        "exemplars": (m, k),
        "labels": (m,),
    }
    for name, shape in shapes.items():
        tensor, dtype = tensors[name], torch.int64 if name == "labels" else torch.float32
        if tensor.shape != shape or tensor.dtype != dtype:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise RouterError(f"expected {name} to be {dtype} {list(shape)}, found {found}: {file}")
        if not tensor.isfinite().all():
            raise RouterError(f"expected finite numbers, found others in {name}: {file}")
    labels = tensors["labels"]
    if m and not (int(labels.min()) >= 0 and int(labels.max()) < count):
        raise RouterError(f"expected labels below {count}, found {int(labels.max())}: {file}")


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _check_target(path: Path) -> None:
    if not path.exists() or (path.is_dir() and (not any(path.iterdir()) or (path / "router.json").exists())):
        return
    raise RouterError(f"expected a new folder or a router to replace, found something else: {path}")


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
