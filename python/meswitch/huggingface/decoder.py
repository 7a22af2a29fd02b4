"""A causal language model run a block at a time, its weights given from outside: memory holds one block, not the model.

    ids ─ embed ─ hidden ─ run_block(0) ─ run_block(1) ─ … ─ hidden ─ head_input ─ x ─ logits
           rows of the          parameters           the head, all its
           embedding that occur  of that block       rows or some

The model stands on the meta device. Its blocks are taken out, and stand-ins put in their place write down how each is
called (masks, rotary angles), once for each shape of the hidden states. A block then runs by itself with whatever
parameters it is handed, and gradients flow into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from meswitch.errors import UnsupportedModelError
from meswitch.huggingface.models import skeleton
from meswitch.huggingface.names import ParameterNames

Weights = Callable[[str], Tensor]
"""A parameter by its name in the checkpoint, in any float type."""
_HINT = "models that are not streamed can be run whole"


class _Reached(Exception):
    """Ends a pass early, with what had come that far."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _StandIn(nn.Module):
    """Answers in a module's place; has all that module's attributes, and none of its parameters."""

    def __init__(self, module: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["module"] = module
        self.__dict__["answer"] = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["answer"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["module"], name)


class Decoder:
    """The blocks of the model in `folder`, whose checkpoint holds parameters of these `names`.

    `embedding` and `head` are those two parameters' names in the checkpoint (the same one where the model ties them).
    `embedding_parameter`, `head_parameter` are the model's own names, `on_disk` says the checkpoint's of any of them,
    and `path` is where the blocks stand in the model. Hidden states are `dtype [windows, length, hidden]`, and so are
    the parameters that blocks are run with; none means the config's own type.

    Raises `UnsupportedModelError` for a model whose files name other parameters than its modules (fused MoE experts),
    or whose blocks are not a plain sequence; `CheckpointError` where transformers knows no such model.
    """

    def __init__(self, folder: Path, names: Iterable[str], dtype: torch.dtype | None = torch.float32) -> None:
        model: Any = skeleton(folder, dtype)
        self._model = model.eval().requires_grad_(False)
        self._type = type(self._model).__name__
        _fill_buffers(self._model)
        self.on_disk = on_disk = ParameterNames(self._model).on_disk(names)
        table, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Linear):
            raise UnsupportedModelError(f"expected an embedding and a linear head, found otherwise: {self._type}")
        self.vocabulary, self.dtype = table.num_embeddings, table.weight.dtype
        table.padding_idx = None  # the table that it runs with has other rows
        modules = {id(module): name for name, module in self._model.named_modules()}
        self.embedding_parameter, self.head_parameter = f"{modules[id(table)]}.weight", f"{modules[id(head)]}.weight"
        parameters = [name for name, _ in self._model.named_parameters()]
        missing = [name for name in parameters if name not in on_disk]
        if missing:
            raise UnsupportedModelError(
                f"expected a tensor of the checkpoint for every parameter of {self._type}, found none for "
                f"{len(missing)} of {len(parameters)}: {missing[0]}",
                hint=_HINT,
            )
        self.embedding, self.head = (
            on_disk[self.embedding_parameter],
            on_disk[self.head_parameter if self.head_parameter in parameters else self.embedding_parameter],
        )
        self._head_bias = on_disk.get(f"{modules[id(head)]}.bias")
        self._take_out(modules, head)
        # Persistent buffers come from the checkpoint as well.
        self._outer = {
            name: on_disk[name]
            for name in self._model.state_dict()
            if name in on_disk and name not in (self.embedding_parameter, self.head_parameter)
        }
        self._inner = [
            {name: there for name in block.state_dict() if (there := on_disk.get(f"{self.path}.{at}.{name}"))}
            for at, block in enumerate(self._blocks)
        ]
        self._calls: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def __len__(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    # --- parameters ---------------------------------------------------------------------------------------------------

    def block_names(self, block: int) -> dict[str, str]:
        """The parameters of a block: their names in the checkpoint, by their names in the block."""
        return self._inner[block]

    def block_module(self, block: int) -> nn.Module:
        """The block itself, on the meta device."""
        return self._blocks[block]

    @property
    def outer_module(self) -> nn.Module:
        """The model without its blocks and head, on the meta device."""
        model: nn.Module = self._model
        return model

    def block_parameters(self, block: int, weights: Weights) -> dict[str, Tensor]:
        """What `run` needs of a block's parameters: copies."""
        return _copies(self._blocks[block], self._inner[block], weights)

    def outer_parameters(self, weights: Weights) -> dict[str, Tensor]:
        """The parameters that belong to no block, without embedding and head: norms, learned positions."""
        return _copies(self._model, self._outer, weights)

    # --- passes -------------------------------------------------------------------------------------------------------

    def embed(self, outer: dict[str, Tensor], rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """Hidden states before the first block, of `ids int64 [windows, length]`.

        `table [n, hidden]` holds the embedding's rows of the tokens `rows int64 [n]`, rising: all that occur.
        """

        def first(at: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise _Reached(hidden)

        return self._pass(outer, table, torch.searchsorted(rows, ids), first)

    def run_block(self, block: int, parameters: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Hidden states after a block, of those before it. Differentiable by `parameters` and `hidden`."""
        args, kwargs = self._called((hidden.shape[0], hidden.shape[1]))[block]
        return _hidden(functional_call(self._blocks[block], parameters, (hidden, *args), kwargs))

    def head_input(self, outer: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """What the head gets to see, of the hidden states after the last block."""

        def substitute(at: int, passed: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._answers[at](hidden)

        def head(x: Tensor) -> Any:
            raise _Reached(x)

        self._called((hidden.shape[0], hidden.shape[1]))
        return self._pass(outer, None, torch.zeros(hidden.shape[:2], dtype=torch.int64), substitute, head)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits `[…, rows]` of what the head sees, for some or all rows of it: `weight [rows, width]`."""
        raw = nn.functional.linear(x, weight, bias).reshape(1, -1, weight.shape[0])

        def through(at: int, passed: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._answers[at](passed)

        self._called((1, 1))
        ids = torch.zeros(1, 1, dtype=torch.int64)
        scaled = self._pass(self._nothing(0.0), None, ids, through, lambda _: raw)
        return scaled.reshape(*x.shape[:-1], weight.shape[0])

    def head_bias(self, weights: Weights) -> Tensor | None:
        """The head's bias, if it has one."""
        return None if self._head_bias is None else weights(self._head_bias).to(self.dtype, copy=True)

    # --- the hollow model ---------------------------------------------------------------------------------------------

    def _take_out(self, modules: dict[int, str], head: nn.Module) -> None:
        """Blocks and head leave the model; stand-ins take their places."""
        lists = [m for m in self._model.modules() if isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())]
        inner = {id(m) for a in lists for m in a.modules() if m is not a}
        outermost = [m for m in lists if id(m) not in inner]
        depth = getattr(self._model.config.get_text_config(), "num_hidden_layers", None)
        found = [m for m in outermost if len(m) == depth]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"expected one list of {depth} blocks in {self._type}, found {len(found)}", hint=_HINT
            )
        self.path, self._blocks = modules[id(found[0])], list(found[0])
        self._answers: list[Callable[[Tensor], Any]] = [lambda hidden: hidden] * len(self._blocks)
        self._at_block: Callable[..., Any] = lambda at, hidden: hidden
        self._at_head: Callable[[Tensor], Any] = lambda x: x

        def place(at: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._at_block(at, *args, **kwargs)

        owner, _, name = self.path.rpartition(".")
        stand_ins = nn.ModuleList([_StandIn(block, place(at)) for at, block in enumerate(self._blocks)])
        self._model.get_submodule(owner)._modules[name] = stand_ins
        owner, _, name = modules[id(head)].rpartition(".")
        self._model.get_submodule(owner)._modules[name] = _StandIn(head, lambda x: self._at_head(x))

    def _pass(
        self,
        outer: dict[str, Tensor],
        table: Tensor | None,
        ids: Tensor,
        at_block: Callable[..., Any],
        at_head: Callable[[Tensor], Any] = lambda x: x,
    ) -> Tensor:
        """Runs what is left of the model; returns what was reached, or the logits."""
        if table is None:
            table = self._zeros(self.embedding_parameter)[:1]
        self._at_block, self._at_head = at_block, at_head
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        try:
            logits: Tensor = functional_call(
                self._model, {**outer, self.embedding_parameter: table}, kwargs=inputs
            ).logits
            return logits
        except _Reached as reached:
            return reached.hidden

    def _zeros(self, name: str, value: float = 0.0) -> Tensor:
        """A parameter of one value, which takes no memory."""
        own = self._model.state_dict()[name]
        return torch.full((), value, dtype=own.dtype).expand(own.shape)

    def _nothing(self, value: float) -> dict[str, Tensor]:
        return {name: self._zeros(name, value) for name in self._outer}

    @torch.no_grad()
    def _called(self, shape: tuple[int, int]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """How the blocks are called on hidden states of this shape: what follows the hidden states."""
        if shape not in self._calls:
            one, other = self._record(shape, 0.0), self._record(shape, 1.0)
            for at, (call, again) in enumerate(zip(one, other, strict=True)):
                if not _same(call, again):
                    raise UnsupportedModelError(
                        f"expected blocks that are called alike on any text, found block {at} otherwise: {self._type}",
                        hint=_HINT,
                    )
            self._calls[shape] = one
        return self._calls[shape]

    def _record(self, shape: tuple[int, int], value: float) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Whatever `value` fills parameters and hidden states: the calls must not depend on it."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(at: int, *args: Any, **kwargs: Any) -> Any:
            if not args and "hidden_states" in kwargs:
                args = (kwargs.pop("hidden_states"),)
            hidden, rest = args[0], args[1:]
            calls.append((rest, kwargs))
            self._answers[at] = self._answer(at, hidden, rest, kwargs)
            return self._answers[at](hidden + value)

        ids = torch.zeros(shape, dtype=torch.int64)
        self._pass(self._nothing(value), self._zeros(self.embedding_parameter, value)[:1], ids, note)
        if len(calls) != len(self._blocks):
            raise UnsupportedModelError(
                f"expected {len(self._blocks)} blocks to run one after the other, found {len(calls)}: {self._type}",
                hint=_HINT,
            )
        return calls

    def _answer(self, at: int, hidden: Tensor, args: Any, kwargs: Any) -> Callable[[Tensor], Any]:
        """How a block hands back its hidden states, alone or first of several: seen on the meta device."""
        block = self._blocks[at]
        state = {name: tensor.to("meta") for name, tensor in (*block.named_parameters(), *block.named_buffers())}
        try:
            found = functional_call(block, state, _to_meta((hidden, *args)), _to_meta(kwargs))
        except Exception as error:  # whatever a block does that the meta device cannot follow
            raise UnsupportedModelError(
                f"expected a block that takes its hidden states first, found block {at} of {self._type} to raise "
                f"{type(error).__name__}: {error}",
                hint=_HINT,
            ) from error
        return (lambda value: value) if isinstance(found, Tensor) else (lambda value: (value, *found[1:]))


def _copies(module: nn.Module, names: dict[str, str], weights: Weights) -> dict[str, Tensor]:
    own = module.state_dict()
    return {name: weights(there).to(own[name].dtype, copy=True) for name, there in names.items()}


def _hidden(found: Any) -> Tensor:
    hidden: Tensor = found if isinstance(found, Tensor) else found[0]
    return hidden


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(item) for item in value)
    return {key: _to_meta(item) for key, item in value.items()} if isinstance(value, dict) else value


def _same(one: Any, other: Any) -> bool:
    """Whether two recorded values are equal; what has a state of its own (a cache, a dictionary to fill) is not."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return bool(one) == bool(other) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return isinstance(one, (type(None), bool, int, float, str)) and bool(one == other)


def _fill_buffers(model: Any) -> None:
    """Gives buffers (rotary frequencies, scales) memory and the values that the model's own initialisation gives."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = not buffers
    model.initialize_weights()
