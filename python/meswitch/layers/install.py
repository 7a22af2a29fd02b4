"""The wrapped modules of one model: where each site of an expert goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.names import ParameterNames, moe_gates
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.rows import BASE_SLOT
from meswitch.layers.embedding import EmbeddingWrapper
from meswitch.layers.first_input import FirstInput
from meswitch.layers.gate import GateWrapper
from meswitch.layers.head import HeadWrapper
from meswitch.layers.linear import LinearWrapper
from meswitch.layers.moe import MoeWrapper, has_moe_experts, is_plain
from meswitch.layers.step import Step
from meswitch.layers.vector import VectorWrapper
from meswitch.layers.wrapper import Wrapper
from meswitch.site import DeltaSite, SharedSite, Site

_MATRICES = (nn.Embedding, nn.Linear, Conv1D)  # modules that have a wrapper of their own


class ExpertLayers:
    """The wrapped modules of one model, and the step they share.

    `check` raises `UnsupportedModelError` or `ArchitectureError` naming the site. After it `install` raises only
    `FormatError`, for tensors of a site that do not fit each other. `check` and `vocabulary_of` may be called from any
    thread: what runs a module there goes through `run`, which calls it where and when the model may be used.
    `packed`: the weights that the base keeps packed, by module; these modules are wrapped from the start to the end.
    `moe_experts`: the sites of those of modules of MoE experts.
    """

    def __init__(
        self,
        model: Any,
        kernels: Kernels,
        run: Callable[[Callable[[], bool]], bool] | None = None,
        packed: Mapping[str, DeltaSite] | None = None,
        moe_experts: Mapping[str, Sequence[Site]] | None = None,
    ) -> None:
        self.model, self.kernels, self._packed, self._moe_experts = model, kernels, packed or {}, moe_experts or {}
        self._run = run or (lambda function: function())
        self._per_token: dict[tuple[str, str], bool] = {}  # by module and parameter, what was found once
        self.step = Step(model.get_input_embeddings().weight.device)
        self.embedding: nn.Module = model.get_input_embeddings()
        self.head: nn.Module | None = model.get_output_embeddings()
        self.kept = bool(model._supports_logits_to_keep())
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._names = {id(module): name for name, module in reversed(self._modules.items())}
        self._parameter_names = ParameterNames(model)
        self._found: dict[str, tuple[nn.Module | None, str]] = {}
        self._wrappers: dict[str, Wrapper] = {}
        self._first_inputs = {
            name: FirstInput(module)
            for name, module in self._modules.items()
            if module._parameters and module is not self.head and not isinstance(module, _MATRICES)
        }
        # Noted once: within a step, vectors stand in their modules with other shapes.
        self._shapes = {
            name: {
                leaf: tuple(parameter.shape) for leaf, parameter in module._parameters.items() if parameter is not None
            }
            for name, module in self._modules.items()
        }
        self._gates = {id(gate) for _, gate in moe_gates(model)}
        self._lasting = {*self._packed, *self._moe_experts}
        if kernels.exact:  # the sums of MoE experts have one order, whether an expert has changed them or not
            self._lasting |= {name for name, module in self._modules.items() if is_plain(module)}
        for name in self._lasting:
            self._attach(self._wrapper(name))
        for sites in self._moe_experts.values():
            self.install(BASE_SLOT, sites, tied=False)

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
        return reads, answers if self._has_own_head(_names(sites), tied) else reads

    def check(self, sites: Iterable[Site], *, tied: bool) -> None:
        """Raises where one of `sites` cannot be served; `tied` says whether the fine-tune ties lm_head."""
        sites = list(sites)
        for wrapper, leaf, site in self._targets(sites, own_head=self._has_own_head(_names(sites), tied)):
            wrapper.check(leaf, site)
            if isinstance(wrapper, VectorWrapper) and not self._is_per_token(wrapper, leaf):
                raise wrapper.refused(leaf, site)

    def _is_per_token(self, wrapper: VectorWrapper, leaf: str) -> bool:
        key = wrapper.name, leaf
        if key not in self._per_token:
            self._per_token[key] = self._run(partial(wrapper.probe, leaf))
        return self._per_token[key]

    def install(self, slot: int, sites: Iterable[Site], *, tied: bool) -> None:
        sites = list(sites)
        for _ in self.installing(slot, sites, _names(sites), tied=tied):
            pass

    def installing(self, slot: int, sites: Iterable[Site], names: Sequence[str], *, tied: bool) -> Iterator[None]:
        """`install` a site at a time: the next is put into the layers when the next item is asked for. `names` are
        those of all `sites`."""
        own_head = self._has_own_head(names, tied)
        for site in sites:
            for wrapper, leaf, _ in self._targets([site], own_head=own_head):
                self._attach(wrapper)
                wrapper.set(slot, leaf, site)
            yield
        if not self.tied and self.head is not None and not own_head:
            head = self._wrapper(self._names[id(self.head)])
            assert isinstance(head, HeadWrapper)
            self._attach(head)
            head.tie(slot)
        self.kernels.settle()

    def remove(self, slot: int) -> None:
        for name, wrapper in list(self._wrappers.items()):
            if slot in wrapper.slots:
                wrapper.clear(slot)
            if not wrapper.slots and name not in self._lasting:
                wrapper.detach()
                del self._wrappers[name]

    def _attach(self, wrapper: Wrapper) -> None:
        if wrapper.name not in self._wrappers:
            wrapper.attach()
            self._wrappers[wrapper.name] = wrapper

    def _find(self, name: str) -> tuple[nn.Module | None, str]:
        """The one module that owns parameter `name`, with or without the model's prefix."""
        if name not in self._found:  # all fine-tunes have the same names
            self._found[name] = self._search(name)
        return self._found[name]

    def _search(self, name: str) -> tuple[nn.Module | None, str]:
        leaf = name.rpartition(".")[2]
        owners: dict[int, nn.Module] = {}
        for spelling in self._parameter_names.spellings(name):
            path, _, leaf = spelling.rpartition(".")
            module = self._modules.get(path)
            if module is not None and (leaf in module._parameters or (leaf == "weight" and hasattr(module, leaf))):
                owners[id(module)] = module
        if not owners and (place := self._parameter_names.stack_place(name)) is not None:
            path, _, leaf = place.parameter.rpartition(".")
            owners[0] = self._modules[path]
        if len(owners) > 1:
            raise UnsupportedModelError(f"{name}: expected one parameter of that name, found {len(owners)}")
        return (next(iter(owners.values())) if owners else None), leaf

    def _nearest(self, name: str) -> str:
        """The type of the innermost module on the way to parameter `name`."""
        paths = self._parameter_names.spellings(name)
        while not (found := [path for path in paths if path in self._modules]):
            paths = tuple(path.rpartition(".")[0] for path in paths)
        return type(self._modules[found[0]]).__name__

    def _targets(self, sites: Iterable[Site], *, own_head: bool) -> list[tuple[Wrapper, str, Site]]:
        """Every (wrapper, parameter, site); without an own head, the site of the embedding serves lm_head as well."""
        fresh: dict[str, Wrapper] = {}
        targets: list[tuple[Wrapper, str, Site]] = []

        def add_target(module: nn.Module, leaf: str, site: Site) -> None:
            name = self._names[id(module)]
            if name not in fresh:
                fresh[name] = self._wrapper(name)
            targets.append((fresh[name], leaf, site))

        for site in sites:
            module, leaf = self._find(site.name)
            if isinstance(site, SharedSite):
                continue
            if module is None or getattr(module, leaf, None) is None:
                raise UnsupportedModelError(
                    f"{site.name}: the base's {self._nearest(site.name)} has no such parameter",
                    hint="a delta changes parameters that stand alone; MoE experts are stored together",
                )
            add_target(module, leaf, site)
            if module is self.embedding and self.head is not None and not own_head:
                add_target(self.head, leaf, site)
        return targets

    def _has_own_head(self, names: Iterable[str], tied: bool) -> bool:
        """Whether lm_head has a site of its own, or is the base's; otherwise it is the fine-tune's embeddings."""
        return not tied or any(self._find(name) == (self.head, "weight") for name in names)

    def _wrapper(self, name: str) -> Wrapper:
        attached = self._wrappers.get(name)
        if attached is not None:
            return attached
        module, packed = self._modules[name], self._packed.get(name)
        if module is self.head:
            return HeadWrapper(
                name,
                module,
                self.step,
                self.kernels,
                packed,
                embedding=self.embedding,
                packed_embedding=self._packed.get(self._names[id(self.embedding)]),
                kept=self.kept,
            )
        if isinstance(module, nn.Embedding):
            return EmbeddingWrapper(name, module, self.step, self.kernels, packed)
        if isinstance(module, _MATRICES):
            return LinearWrapper(name, module, self.step, self.kernels, packed)
        if has_moe_experts(module):
            place = self._parameter_names.stack_place
            return MoeWrapper(name, module, self.step, self.kernels, place, packed=name in self._moe_experts)
        if id(module) in self._gates:
            return GateWrapper(name, module, self.step, self.kernels, self._shapes[name])
        return VectorWrapper(name, module, self.step, self.kernels, self._shapes[name], self._first_inputs[name])


def _names(sites: Iterable[Site]) -> list[str]:
    return [site.name for site in sites]
