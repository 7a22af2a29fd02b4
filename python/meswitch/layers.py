"""Modules of the base that add an expert's delta to their own output, row by row.

    x [T, in] ── base module ──> y [T, out] ── += Δ̂ of slot(t) · x[t] ──> y
                                     │
                  Step: slot of every packed token, slot of every kept logits row, written before each forward

A module is touched on the instance only (its `forward`, or an embedding's class), when the first expert
changes one of its parameters, and given back when the last such expert leaves. Its own weights are never
written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.pytorch_utils import Conv1D

from meswitch import _native, ops
from meswitch.delta import Site
from meswitch.errors import ArchitectureError, UnsupportedModelError


class Step:
    """The rows of the running forward pass, one object shared by every wrapper."""

    def __init__(self) -> None:
        self.end()
        self._input: Tensor | None = None
        self._leader: LinearWrapper | None = None

    def follow(self, wrapper: LinearWrapper, x: Tensor) -> None:
        """Remembers who takes the same input as the module before it: those are asked together from then on."""
        if self._leader is None or x is not self._input or wrapper.rows is not self._leader.rows:
            self._input, self._leader = x, wrapper
        elif wrapper is not self._leader:
            self._leader.followers.append(wrapper)

    def begin(self, tokens: list[int], kept: list[int]) -> None:
        """`tokens`: the slot of every packed token; `kept`: of every row that reaches lm_head. −1 is the
        base."""
        self.tokens = ops.Rows(tokens)
        self.kept = ops.Rows(kept)
        self.top = max(tokens) + 1
        self.bank_index, self.kept_index = self.tokens.tensor + 1, self.kept.tensor + 1

    def end(self) -> None:
        """No expert is active: a forward pass outside a step is the base's."""
        self.tokens = self.kept = ops.Rows([])
        self.bank_index = self.kept_index = self.tokens.tensor
        self.top = 0


class Bank:
    """The values that experts give one vector parameter: row 0 is the base's, row slot + 1 that slot's."""

    def __init__(self, base: Tensor) -> None:
        self.base = base.detach()
        self.rows = self.base.unsqueeze(0).clone()

    def set(self, slot: int, value: Tensor) -> None:
        missing = slot + 2 - self.rows.shape[0]
        if missing > 0:
            self.rows = torch.cat([self.rows, self.base.expand(missing, *self.base.shape)])
        self.rows[slot + 1] = value.to(self.rows.dtype)

    def clear(self, slot: int) -> None:
        if slot + 1 < self.rows.shape[0]:
            self.rows[slot + 1] = self.base

    def of(self, slot: int) -> Tensor:
        """The vector of one slot."""
        return self.rows[slot + 1] if slot + 1 < self.rows.shape[0] else self.base

    def gather(self, index: Tensor, top: int) -> Tensor:
        """The vector of every token, `[T, ...]`, by slot + 1, at most `top`; the base's for a slot without."""
        if top >= self.rows.shape[0]:
            index = index.where(index < self.rows.shape[0], torch.zeros((), dtype=index.dtype))
        return self.rows.index_select(0, index)


class Wrapper:
    """What experts changed in one module. `leaves` are the names of the module's own parameters."""

    def __init__(self, name: str, module: nn.Module, step: Step, exact: bool) -> None:
        self.name, self.module, self.step, self.exact = name, module, step, exact
        self.slots: set[int] = set()
        self._own: Any = None

    def check(self, leaf: str, site: Site) -> None:
        """Raises where `site` cannot be served here."""

    def set(self, slot: int, leaf: str, site: Site) -> None:
        raise NotImplementedError

    def clear(self, slot: int) -> None:
        self.slots.discard(slot)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def attach(self) -> None:
        self._own = self.module.__dict__.get("forward")
        self.base = self.module.forward
        self.module.forward = self.forward

    def detach(self) -> None:
        if self._own is None:
            del self.module.__dict__["forward"]
        else:
            self.module.forward = self._own

    def active(self, rows: ops.Rows) -> bool:
        return rows.any and not self.slots.isdisjoint(rows.tokens)

    def expect_rows(self, found: int, rows: ops.Rows) -> None:
        if found != len(rows.slots):
            raise UnsupportedModelError(
                f"{self.name}: expected a row for each of {len(rows.slots)} tokens, found {found}",
                hint=f"{type(self.module).__name__} does not see every token of a packed step",
            )


def _mismatch(site: Site, module: nn.Module, expected: object, found: object) -> ArchitectureError:
    return ArchitectureError(f"{site.name} ({type(module).__name__}): expected {expected}, found {found}")


class LinearWrapper(Wrapper):
    """`nn.Linear` (and quantized forms of it) and GPT-2's `Conv1D`: `y = base(x)`, then the delta, then the
    bias."""

    def __init__(self, name: str, module: nn.Module, step: Step, exact: bool) -> None:
        super().__init__(name, module, step, exact)
        self.transposed = isinstance(module, Conv1D)
        if self.transposed:
            self.out_features, self.in_features = int(module.nf), int(module.nx)  # type: ignore[arg-type]
        else:
            self.out_features, self.in_features = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        self.table = ops.SiteTable(self.out_features, self.in_features)
        self.whole: dict[int, Tensor] = {}
        self.bias: Bank | None = None
        self.ordinary = not exact and type(module) is nn.Linear and "forward" not in module.__dict__
        self.direct = self.ordinary and module.bias is None and ops.reads(module.weight)
        self.followers: list[LinearWrapper] = []
        self.ready: tuple[ops.Rows, Tensor, Tensor] | None = None  # of a step, an input, and the product with it

    @property
    def rows(self) -> ops.Rows:
        return self.step.tokens

    @property
    def own_bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def check(self, leaf: str, site: Site) -> None:
        if leaf not in ("weight", "bias"):
            raise UnsupportedModelError(f"{site.name}: unknown parameter of {type(self.module).__name__}: {leaf}")
        own = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        expected = (self.out_features,) if leaf == "bias" else own
        if tuple(site.shape) != expected or site.added is not None:
            raise _mismatch(site, self.module, expected, tuple(site.shape))
        if leaf == "weight" and site.whole is None and site.transposed != self.transposed:
            raise _mismatch(site, self.module, f"transposed={self.transposed}", f"transposed={site.transposed}")

    def set(self, slot: int, leaf: str, site: Site) -> None:
        self.slots.add(slot)
        if leaf == "bias":
            self.set_bias(slot, site)
        elif site.kind == "replaced":
            assert site.whole is not None
            self.whole[slot] = site.whole.T if self.transposed else site.whole
        else:
            self.table.set(slot, site)

    def set_bias(self, slot: int, site: Site) -> None:
        base = self.own_bias
        assert base is not None
        if self.bias is None:  # the bank holds differences: the base module has already added its own
            self.bias = Bank(torch.zeros(self.out_features, dtype=base.dtype))
        self.bias.set(slot, site.restore(base)[: self.out_features].float() - base.float())

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.whole.pop(slot, None)
        self.table.set(slot, None)
        if self.bias is not None:
            self.bias.clear(slot)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = self.rows
        active = self.active(rows)
        if active:
            self.expect_rows(x.numel() // self.in_features, rows)
            crowds = self.crowds(rows)
            if crowds:
                return self._merged(x, rows, crowds)
        if self._reads(x):
            summed, y = active and self.at_once(rows), self._product(x)
        else:
            summed, y = False, self.base(x, *args, **kwargs)
        if not active or (summed and self.plain):
            return y
        if self.plain and x.is_contiguous() and y.is_contiguous():
            ops.delta_linear(y, x, rows, self.table, exact=self.exact)
            return y
        flat_x, flat_y = x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)
        self.add(flat_y, flat_x, rows, summed)
        return self.shaped(y, flat_y, flat_x, rows)

    def _product(self, x: Tensor) -> Tensor:
        """The base's product with what deltas may be added at once; with it, those of modules that last took the same
        input after this one."""
        ready = self.ready
        if ready is not None and ready[0] is self.rows and ready[1] is x:
            self.ready = None
            return ready[2]
        for other in [other for other in self.followers if other.ready is not None]:  # who did not come follows no more
            self.followers.remove(other)
            other.ready = None
        product, *others = ops.linear(x, [wrapper._site(x) for wrapper in (self, *self.followers)])
        for other, y in zip(self.followers, others, strict=True):
            other.ready = other.rows, x, y
        self.step.follow(self, x)
        return product

    def _site(self, x: Tensor) -> tuple[Tensor, ops.SiteTable, ops.Rows | None]:
        """As `ops.linear` takes it, for an input that a module in front was given."""
        rows, weight = self.rows, self.module.weight
        fits = x.numel() == len(rows.slots) * self.in_features  # else `forward` will refuse it
        return weight, self.table, rows if fits and self.active(rows) and self.at_once(rows) else None  # type: ignore[return-value]

    def crowds(self, rows: ops.Rows) -> list[int]:
        """The slots with so many tokens that base and delta are put together for them."""
        if rows.most < ops.CROWD or not self.ordinary or not ops.merges(self.module.weight):  # type: ignore[arg-type]
            return []
        return [slot for slot, own in rows.tokens.items() if len(own) >= ops.CROWD and self.table.get(slot) is not None]

    def _merged(self, x: Tensor, rows: ops.Rows, crowds: list[int]) -> Tensor:
        """All tokens: those of `crowds` by one product each, the others as ever."""
        flat, weight = x.reshape(-1, self.in_features), self.module.weight
        if rows.only is not None:
            y = ops.merged(flat, weight, self._delta(rows.only), self.own_bias)  # type: ignore[arg-type]
        else:
            y = flat.new_empty(len(flat), self.out_features)
            for slot in crowds:
                index = rows.groups[slot]
                y[index] = ops.merged(flat[index], weight, self._delta(slot), self.own_bias)  # type: ignore[arg-type]
            index, others = rows.without(crowds)
            if others.slots:
                part = self.base(flat[index])
                ops.delta_linear(part, flat[index], others, self.table)
                y[index] = part
        self.add(y, flat, rows, True)
        return y.view(*x.shape[:-1], self.out_features)

    def _delta(self, slot: int) -> _native.Matrix:
        delta = self.table.matrix(slot)
        assert delta is not None
        return delta

    def _reads(self, x: Tensor) -> bool:
        """Whether the base's own product is quicker on our kernels: few tokens, and 16 bits a weight."""
        few = x.numel() <= ops.MOST_TOKENS * self.in_features and x.dtype == torch.bfloat16 and x.is_contiguous()
        return few and self.direct and x.numel() > 0

    def at_once(self, rows: ops.Rows) -> bool:
        """Whether the base's product may come with the deltas of all its tokens."""
        return True

    @property
    def plain(self) -> bool:
        """Whether deltas of the weight are all that there is to add."""
        return not self.whole and self.bias is None

    def add(self, y: Tensor, x: Tensor, rows: ops.Rows, summed: bool) -> None:
        """All that experts change here; deltas of the weight too, unless they are `summed` already."""
        for slot in self.whole.keys() & rows.groups.keys():
            index = rows.groups[slot]
            weight = self.whole[slot][: self.out_features].to(x.dtype)
            y[index] = F.linear(x[index], weight, self.own_bias)
        if self.table.occupied and not summed:
            ops.delta_linear(y, x, rows, self.table, exact=self.exact)
        if self.bias is not None:
            index = self.step.kept_index if rows is self.step.kept else self.step.bank_index
            y += self.bias.gather(index, self.step.top)

    def shaped(self, y: Tensor, flat_y: Tensor, flat_x: Tensor, rows: ops.Rows) -> Tensor:
        return flat_y.view(y.shape)


class HeadWrapper(LinearWrapper):
    """lm_head: it sees the kept rows only, may be tied to the embeddings, and widens to the largest
    vocabulary in play."""

    def __init__(self, name: str, module: nn.Module, step: Step, exact: bool, embedding: nn.Module, kept: bool) -> None:
        super().__init__(name, module, step, exact)
        self.embedding, self.kept = embedding, kept
        self.ordinary = False  # few rows reach it
        self.borrowed: set[int] = set()
        self.widths: dict[int, int] = {}
        self.added: dict[int, Tensor] = {}
        self.added_bias: dict[int, Tensor] = {}

    @property
    def rows(self) -> ops.Rows:
        return self.step.kept if self.kept else self.step.tokens

    @property
    def plain(self) -> bool:
        return super().plain and not self.borrowed and all(rows == self.out_features for rows in self.widths.values())

    def at_once(self, rows: ops.Rows) -> bool:
        return self.borrowed.isdisjoint(rows.tokens)

    def check(self, leaf: str, site: Site) -> None:
        known = site.shape[0] - (0 if site.added is None else site.added.shape[0])
        right = known <= self.out_features and tuple(site.shape[1:]) == (() if leaf == "bias" else (self.in_features,))
        if not right and site.whole is None:
            raise _mismatch(site, self.module, (self.out_features, self.in_features), tuple(site.shape))

    def set(self, slot: int, leaf: str, site: Site) -> None:
        super().set(slot, leaf, site)
        if leaf == "bias":
            if site.shape[0] > self.out_features:
                self.added_bias[slot] = site.restore(self.own_bias)[self.out_features :]  # type: ignore[arg-type]
            return
        self.widths[slot] = site.shape[0]
        if site.added is not None:
            self.added[slot] = site.added
        elif site.whole is not None and site.shape[0] > self.out_features:
            self.added[slot] = site.whole[self.out_features :]

    def borrow(self, slot: int) -> None:
        """This slot's lm_head is its embeddings', though the base's is not."""
        self.slots.add(slot)
        self.borrowed.add(slot)

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.borrowed.discard(slot)
        for of_slot in (self.widths, self.added, self.added_bias):
            of_slot.pop(slot, None)

    def add(self, y: Tensor, x: Tensor, rows: ops.Rows, summed: bool) -> None:
        for slot in self.borrowed & rows.groups.keys():
            index = rows.groups[slot]
            y[index] = F.linear(x[index], self.embedding.weight, self.own_bias)  # type: ignore[arg-type]
        super().add(y, x, rows, summed)

    def shaped(self, y: Tensor, flat_y: Tensor, flat_x: Tensor, rows: ops.Rows) -> Tensor:
        widths = {slot: self.widths.get(slot, self.out_features) for slot in rows.groups}
        widest = max(self.out_features, *widths.values())
        if all(width == self.out_features for width in widths.values()):
            return flat_y.view(y.shape)
        wide = flat_y.new_full((flat_y.shape[0], widest), -torch.inf)
        wide[:, : self.out_features] = flat_y
        for slot, index in rows.groups.items():
            if slot in self.added:
                bias = self.added_bias.get(slot)
                extra = F.linear(flat_x[index], self.added[slot].to(flat_x.dtype), bias)
                wide[index, self.out_features : widths[slot]] = extra
            wide[index, widths[slot] :] = -torch.inf
        return wide.view(*y.shape[:-1], widest)


class _ExpertEmbedding(nn.Embedding):
    """Sits behind an embedding class in its method order, so a subclass's own scaling or offset stays as it
    is."""

    def forward(self, input: Tensor) -> Tensor:
        wrapper: EmbeddingWrapper = self.__dict__["_expert_wrapper"]
        return wrapper.lookup(super().forward, input)


_embedding_classes: dict[type, type] = {}


def _embedding_class(kind: type) -> type:
    if kind not in _embedding_classes:
        bases = (_ExpertEmbedding,) if kind is nn.Embedding else (kind, _ExpertEmbedding)
        _embedding_classes[kind] = type(f"Expert{kind.__name__}", bases, {})
    return _embedding_classes[kind]


class EmbeddingWrapper(Wrapper):
    """`nn.Embedding` and its subclasses: rows of Δ̂ by token id, and the rows of a grown vocabulary."""

    def __init__(self, name: str, module: nn.Embedding, step: Step, exact: bool) -> None:
        super().__init__(name, module, step, exact)
        self.known = module.num_embeddings
        self.table = ops.SiteTable(module.num_embeddings, module.embedding_dim)
        self.whole: dict[int, Tensor] = {}
        self.added: dict[int, Tensor] = {}

    def check(self, leaf: str, site: Site) -> None:
        assert isinstance(self.module, nn.Embedding)
        code = type(self.module).forward.__code__
        if type(self.module).forward is not nn.Embedding.forward and "__class__" not in code.co_freevars:
            raise UnsupportedModelError(
                f"{site.name}: an embedding with a lookup of its own: {type(self.module).__name__}"
            )
        width = self.module.embedding_dim
        known = site.shape[0] - (0 if site.added is None else site.added.shape[0])
        if leaf != "weight" or tuple(site.shape[1:]) != (width,) or (site.whole is None and known > self.known):
            raise _mismatch(site, self.module, (self.known, width), tuple(site.shape))

    def set(self, slot: int, leaf: str, site: Site) -> None:
        self.slots.add(slot)
        if site.kind == "replaced":
            assert site.whole is not None
            self.whole[slot] = site.whole
        else:
            self.table.set(slot, site)
        if site.added is not None:
            self.added[slot] = site.added

    def clear(self, slot: int) -> None:
        super().clear(slot)
        self.table.set(slot, None)
        self.whole.pop(slot, None)
        self.added.pop(slot, None)

    def attach(self) -> None:
        self._own = type(self.module)
        self.module.__dict__["_expert_wrapper"] = self
        self.module.__class__ = _embedding_class(self._own)

    def detach(self) -> None:
        self.module.__class__ = self._own
        del self.module.__dict__["_expert_wrapper"]

    def lookup(self, base: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
        rows = self.step.tokens
        if not self.active(rows):
            return base(ids)
        self.expect_rows(ids.numel(), rows)
        y = base(ids.clamp(max=self.known - 1))  # ids of a grown vocabulary get their rows below
        flat_y, flat_ids = y.view(-1, y.shape[-1]), ids.reshape(-1).long()
        if self.table.occupied:
            ops.delta_embedding(flat_y, flat_ids, rows, self.table)
        for slot, index in rows.groups.items():
            if slot in self.whole:
                flat_y[index] = self.whole[slot][flat_ids[index]].to(y.dtype)
            elif slot in self.added:
                beyond = index[flat_ids[index] >= self.known]
                flat_y[beyond] = self.added[slot][flat_ids[beyond] - self.known].to(y.dtype)
        return y


class VectorWrapper(Wrapper):
    """Norms and whatever else computes with small parameters: the module runs with one value of them per
    token."""

    def __init__(self, name: str, module: nn.Module, step: Step, exact: bool) -> None:
        super().__init__(name, module, step, exact)
        self.banks: dict[str, Bank] = {}

    def check(self, leaf: str, site: Site) -> None:
        parameter: Tensor = getattr(self.module, leaf)
        if tuple(parameter.shape) != tuple(site.shape):
            raise _mismatch(site, self.module, tuple(parameter.shape), tuple(site.shape))
        if parameter.dim() > 2 or not self._probe(leaf, parameter):
            raise UnsupportedModelError(
                f"{site.name}: no way to give each request its own {leaf} {tuple(parameter.shape)} "
                f"in a module of type {type(self.module).__name__}"
            )

    def set(self, slot: int, leaf: str, site: Site) -> None:
        self.slots.add(slot)
        base: Tensor = getattr(self.module, leaf)
        if leaf not in self.banks:
            self.banks[leaf] = Bank(base)
        self.banks[leaf].set(slot, site.restore(base.detach()))

    def clear(self, slot: int) -> None:
        super().clear(slot)
        for bank in self.banks.values():
            bank.clear(slot)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = self.step.tokens
        if not self.active(rows):
            return self.base(x, *args, **kwargs)
        if rows.only is not None:  # whatever rows this module sees, they are that slot's
            return self._with({leaf: bank.of(rows.only) for leaf, bank in self.banks.items()}, x, *args, **kwargs)
        values = {leaf: bank.gather(self.step.bank_index, self.step.top) for leaf, bank in self.banks.items()}
        return self._run(values, x, *args, **kwargs)

    def _run(self, values: Mapping[str, Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module on `x`, each token with its own row of `values [T, ...]`."""
        shaped = {leaf: self._per_token(value, x) for leaf, value in values.items()}
        if type(self.module) in (nn.LayerNorm, nn.RMSNorm):
            return self._normalised(shaped, x)
        return self._with(shaped, x, *args, **kwargs)

    def _with(self, values: Mapping[str, Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module on `x`, with these parameters."""
        parameters = self.module._parameters
        own = {leaf: parameters[leaf] for leaf in values}
        parameters.update(values)  # type: ignore[arg-type]
        try:
            return self.base(x, *args, **kwargs)
        finally:
            parameters.update(own)

    def _normalised(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """torch's own norms check the shape of their parameters, so these are applied outside, in float32."""
        module = self.module
        if isinstance(module, nn.LayerNorm):
            y = F.layer_norm(x.float(), module.normalized_shape, None, None, module.eps)
        else:
            assert isinstance(module, nn.RMSNorm)
            eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
            y = F.rms_norm(x.float(), list(module.normalized_shape), None, eps)
        weight, bias = values.get("weight", module.weight), values.get("bias", getattr(module, "bias", None))
        y = y if weight is None else y * weight.float()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def _per_token(self, value: Tensor, x: Tensor) -> Tensor:
        """`value [T, *own]` shaped to broadcast over `x`, whose axes before `own` hold the tokens once."""
        own = value.dim() - 1
        lead = x.shape[: x.dim() - own]
        axes = [axis for axis, size in enumerate(lead) if size == value.shape[0]]
        if not axes or tuple(x.shape[x.dim() - own :]) != tuple(value.shape[1:]):
            self.expect_rows(x[..., 0].numel() if x.dim() else 0, self.step.tokens)
            axes = axes or [0]
        axis = max(axes, key=lambda a: x.stride(a))  # tokens lie outermost in memory, heads within them
        shape = [1] * len(lead)
        shape[axis] = value.shape[0]
        return value.view(*shape, *value.shape[1:])

    def _probe(self, leaf: str, parameter: Tensor) -> bool:
        """Whether the module, given one value per token, computes what it would with each value in turn."""
        base = getattr(self, "base", None)
        self.base = self.module.forward if base is None else base
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 5, *parameter.shape, generator=generator).to(parameter.dtype)
        values = torch.randn(5, *parameter.shape, generator=generator).to(parameter.dtype)
        own = self.module._parameters[leaf]
        try:
            together = self._run({leaf: values}, x)
            apart = []
            for token in range(5):
                self.module._parameters[leaf] = values[token]  # type: ignore[assignment]
                apart.append(self.base(x[:, token : token + 1]))
            return bool(torch.allclose(together.float(), torch.cat(apart, dim=1).float(), rtol=1e-2, atol=1e-2))
        except Exception:  # whatever this module does with its parameter, it is not per token
            return False
        finally:
            self.module._parameters[leaf] = own


class ExpertLayers:
    """The wrapped modules of one model, and the step they share.

    `exact` asks for the reference's arithmetic. Raises `UnsupportedModelError` or `ArchitectureError` naming
    the site from `check`; `install` and `remove` then cannot fail.
    """

    def __init__(self, model: Any, *, exact: bool = False) -> None:
        self.model, self.exact, self.step = model, exact, Step()
        self.embedding: nn.Module = model.get_input_embeddings()
        self.head: nn.Module | None = model.get_output_embeddings()
        self.kept = bool(model._supports_logits_to_keep())
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._names = {id(module): name for name, module in reversed(self._modules.items())}
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self._renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
        self._wrappers: dict[str, Wrapper] = {}

    @property
    def vocabulary(self) -> int:
        """Rows of the base's embedding table."""
        return int(self.embedding.num_embeddings)  # type: ignore[arg-type]

    @property
    def tied(self) -> bool:
        return self.head is not None and self.head.weight is self.embedding.weight

    @property
    def outputs(self) -> int:
        """Rows of the base's lm_head."""
        return int(self.head.out_features) if self.head is not None else self.vocabulary  # type: ignore[arg-type]

    def vocabulary_of(self, sites: Iterable[Site], *, tied: bool) -> tuple[int, int]:
        """Token ids that the fine-tune behind `sites` reads, and those it can answer with."""
        sites = list(sites)
        reads, answers = self.vocabulary, self.outputs
        for site in sites:
            module, leaf = self._find(site.name)
            if module is self.embedding:
                reads = site.shape[0]
            elif module is self.head and leaf == "weight":
                answers = site.shape[0]
        return reads, answers if self._heads_itself(sites, tied) else reads

    def check(self, sites: Iterable[Site], *, tied: bool) -> None:
        """Raises where one of `sites` cannot be served; `tied` says whether the fine-tune ties lm_head."""
        for wrapper, leaf, site in self._targets(sites, tied):
            wrapper.check(leaf, site)

    def install(self, slot: int, sites: Iterable[Site], *, tied: bool) -> None:
        sites = list(sites)
        for wrapper, leaf, site in self._targets(sites, tied):
            self._wear(wrapper)
            wrapper.set(slot, leaf, site)
        if not self.tied and self.head is not None and not self._heads_itself(sites, tied):
            head = self._wrapper(self._names[id(self.head)])
            assert isinstance(head, HeadWrapper)
            self._wear(head)
            head.borrow(slot)

    def remove(self, slot: int) -> None:
        for name, wrapper in list(self._wrappers.items()):
            if slot in wrapper.slots:
                wrapper.clear(slot)
            if not wrapper.slots:
                wrapper.detach()
                del self._wrappers[name]

    def _wear(self, wrapper: Wrapper) -> None:
        if wrapper.name not in self._wrappers:
            wrapper.attach()
            self._wrappers[wrapper.name] = wrapper

    def _find(self, name: str) -> tuple[nn.Module | None, str]:
        """The one module that owns parameter `name`, with or without the model's prefix."""
        renamed = apply_renamings(name, self._renamings)  # as from_pretrained renames it
        path, _, leaf = renamed.rpartition(".")
        prefix = self._prefix + "."
        paths = {path, prefix + path, path[len(prefix) :] if path.startswith(prefix) else path}
        owners = {
            id(module): module
            for module in (self._modules.get(candidate) for candidate in paths)
            if module is not None and (leaf in module._parameters or (leaf == "weight" and hasattr(module, leaf)))
        }
        if len(owners) > 1:
            raise UnsupportedModelError(f"{name}: expected one parameter of that name, found {len(owners)}")
        return (next(iter(owners.values())) if owners else None), leaf

    def _nearest(self, name: str) -> str:
        """The type of the innermost module on the way to parameter `name`."""
        path = apply_renamings(name, self._renamings)
        while path and path not in self._modules and f"{self._prefix}.{path}" not in self._modules:
            path = path.rpartition(".")[0]
        return type(self._modules.get(path, self._modules.get(f"{self._prefix}.{path}"))).__name__

    def _targets(self, sites: Iterable[Site], tied: bool) -> list[tuple[Wrapper, str, Site]]:
        """Every (wrapper, parameter, site); a tied fine-tune's embedding site serves lm_head as well."""
        sites = list(sites)
        own_head = self._heads_itself(sites, tied)
        fresh: dict[str, Wrapper] = {}
        targets: list[tuple[Wrapper, str, Site]] = []

        def aim(module: nn.Module, leaf: str, site: Site) -> None:
            name = self._names[id(module)]
            if name not in fresh:
                fresh[name] = self._wrapper(name)
            targets.append((fresh[name], leaf, site))

        for site in sites:
            module, leaf = self._find(site.name)
            if site.kind == "shared":
                continue
            if module is None or getattr(module, leaf, None) is None:
                raise UnsupportedModelError(
                    f"{site.name}: the base's {self._nearest(site.name)} has no such parameter",
                    hint="a delta changes parameters that stand alone; MoE experts are stored together",
                )
            aim(module, leaf, site)
            if module is self.embedding and self.head is not None and not own_head:
                aim(self.head, leaf, site)
        return targets

    def _heads_itself(self, sites: Iterable[Site], tied: bool) -> bool:
        """Whether lm_head has a site of its own, or is the base's; otherwise it is the fine-tune's
        embeddings."""
        return not tied or any(self._find(site.name) == (self.head, "weight") for site in sites)

    def _wrapper(self, name: str) -> Wrapper:
        if name in self._wrappers:
            return self._wrappers[name]
        module = self._modules[name]
        if module is self.head:
            return HeadWrapper(name, module, self.step, self.exact, self.embedding, self.kept)
        if isinstance(module, nn.Embedding):
            return EmbeddingWrapper(name, module, self.step, self.exact)
        if isinstance(module, nn.Linear | Conv1D):
            return LinearWrapper(name, module, self.step, self.exact)
        return VectorWrapper(name, module, self.step, self.exact)
