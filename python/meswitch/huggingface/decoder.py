"""A causal language model that runs a block at a time, with weights given from outside: one block in memory, no model.

    ids ── embed ── hidden ── run_block(0) ── run_block(1) ── … ── hidden ── head_input ── x ── logits
           rows of the          parameters of                                head weights, all its
           embedding in use     that block                                   rows or some

The model is built on the meta device, and its blocks and head are replaced by placeholders that record how each block
is called (masks, rotary angles), once for each shape of the hidden states. A block then runs alone, on any parameters
it is given, and gradients reach those.
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
"""Returns a parameter by its name in the checkpoint, in any float dtype."""
_HINT = "models that are not streamed can be run whole"


class _Captured(Exception):
    """Ends a forward pass early, with the tensor that it was run for."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor


class _Placeholder(nn.Module):
    """Takes a module's place and calls `function` instead. Has the module's attributes and none of its parameters."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["module"] = module
        self.__dict__["function"] = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["function"](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["module"], name)


class Decoder:
    """The blocks of the model in `folder`, whose checkpoint holds tensors of these `names`.

    `embedding`, `head`: the checkpoint's names of these parameters, the same one where the model ties them.
    `embedding_parameter`, `head_parameter`: the model's names of them. `checkpoint_names`: the checkpoint's name of
    every parameter and buffer, by the model's. `blocks_path`: the path of the list of blocks in the model.
    `vocabulary`: rows of the embedding. `moe_experts`: of each parameter in which transformers stacks tensors of the
    checkpoint, those of each MoE expert (`ParameterNames.moe_experts`).

    Hidden states are `dtype [windows, length, hidden]`, and the parameters that blocks run with have that dtype too;
    `dtype=None` takes the config's. The decoder keeps no weights, so it serves any fine-tune of the same shapes. One
    thread at a time may use it.

    Raises `UnsupportedModelError` for a model whose checkpoint has other tensors than its modules have parameters, or
    whose blocks are not a plain sequence; `CheckpointError` where transformers knows no such model.
    """

    def __init__(self, folder: Path, names: Iterable[str], dtype: torch.dtype | None = torch.float32) -> None:
        model: Any = skeleton(folder, dtype)
        self._model = model.eval().requires_grad_(False)
        self._type = type(self._model).__name__
        _fill_buffers(self._model)
        own, names = ParameterNames(self._model), list(names)
        self.checkpoint_names = on_disk = own.on_disk(names)
        self.moe_experts = own.moe_experts(names)
        embedding, head = self._model.get_input_embeddings(), self._model.get_output_embeddings()
        if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
            raise UnsupportedModelError(f"expected an embedding and a linear head, found otherwise: {self._type}")
        self.vocabulary, self.dtype = embedding.num_embeddings, embedding.weight.dtype
        embedding.padding_idx = None  # `embed` runs it with fewer rows
        paths = {id(module): path for path, module in self._model.named_modules()}
        self.embedding_parameter, self.head_parameter = f"{paths[id(embedding)]}.weight", f"{paths[id(head)]}.weight"
        parameters = self._check_parameters()
        self.embedding = on_disk[self.embedding_parameter]
        self.head = on_disk[self.head_parameter] if self.head_parameter in parameters else self.embedding
        self._head_bias = on_disk.get(f"{paths[id(head)]}.bias")
        self._replace_modules(paths, head)
        # Persistent buffers come from the checkpoint as well.
        self._outer_names = {
            name: on_disk[name]
            for name in self._model.state_dict()
            if name in on_disk and name not in (self.embedding_parameter, self.head_parameter)
        }
        self._block_names = [
            {
                name: on_disk[f"{self.blocks_path}.{block}.{name}"]
                for name in module.state_dict()
                if f"{self.blocks_path}.{block}.{name}" in on_disk
            }
            for block, module in enumerate(self._blocks)
        ]
        self._calls: dict[tuple[int, int], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self._blocks)

    # --- parameters ---------------------------------------------------------------------------------------------------

    def block_names(self, block: int) -> dict[str, str]:
        """The checkpoint's names of a block's parameters, by their names in the block; without its stacks."""
        return self._block_names[block]

    def block_stacks(self, block: int) -> dict[str, list[list[str]]]:
        """The checkpoint's names of each MoE expert's tensors, by the names of a block's stacks of them."""
        names = (name for name, _ in self._blocks[block].named_parameters())
        paths = {name: f"{self.blocks_path}.{block}.{name}" for name in names}
        return {name: self.moe_experts[path] for name, path in paths.items() if path in self.moe_experts}

    def block_module(self, block: int) -> nn.Module:
        """The block itself, on the meta device."""
        return self._blocks[block]

    @property
    def outer_module(self) -> nn.Module:
        """The model with placeholders for its blocks and head, on the meta device."""
        model: nn.Module = self._model
        return model

    def block_parameters(self, block: int, weights: Weights) -> dict[str, Tensor]:
        """The parameters that `run_block` takes, as copies."""
        parameters = _copies(self._blocks[block], self._block_names[block], weights)
        for name, moe_experts in self.block_stacks(block).items():
            parameters[name] = _stack(moe_experts, self._blocks[block].get_parameter(name), weights)
        return parameters

    def outer_parameters(self, weights: Weights) -> dict[str, Tensor]:
        """The parameters that belong to no block, without embedding and head (norms, learned positions), as copies."""
        return _copies(self._model, self._outer_names, weights)

    def head_bias(self, weights: Weights) -> Tensor | None:
        """The head's bias, a copy; `None` if it has none."""
        return None if self._head_bias is None else weights(self._head_bias).to(self.dtype, copy=True)

    # --- passes -------------------------------------------------------------------------------------------------------

    def check(self, ids: Tensor) -> None:
        """Raises `UnsupportedModelError` if blocks cannot be run by themselves on ids `[windows, length]`.

        So would the first `run_block` of that shape.
        """
        self._recorded_calls((ids.shape[0], ids.shape[1]))

    def embed(self, outer: dict[str, Tensor], tokens: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """Hidden states before the first block, of `ids int64 [windows, length]`.

        `tokens int64 [n]`: the distinct tokens of `ids`, rising; `rows [n, hidden]`: their rows of the embedding.
        """

        def first_block(block: int, hidden: Tensor, /, *args: Any, **kwargs: Any) -> Any:
            raise _Captured(hidden)

        return self._run_outer(outer, rows, torch.searchsorted(tokens, ids), first_block)

    def run_block(self, block: int, parameters: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """Hidden states after a block, of those before it. Differentiable by `parameters` and `hidden`."""
        args, kwargs = self._recorded_calls((hidden.shape[0], hidden.shape[1]))[block]
        return _hidden_states(functional_call(self._blocks[block], parameters, (hidden, *args), kwargs))

    def head_input(self, outer: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """The head's input `[windows, length, hidden]`, of the hidden states after the last block (the final norm)."""

        def any_block(block: int, dummy: Tensor, /, *args: Any, **kwargs: Any) -> Any:
            return self._wrap_output[block](hidden)

        def head(x: Tensor) -> Any:
            raise _Captured(x)

        self._recorded_calls((hidden.shape[0], hidden.shape[1]))
        return self._run_outer(outer, None, torch.zeros(hidden.shape[:2], dtype=torch.int64), any_block, head)

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The logits `[…, n]` of head inputs `x […, width]`, for the head's rows `weight [n, width]`, `bias [n]`.

        Includes what the model does to logits after the head (scaling, soft caps).
        """
        raw = nn.functional.linear(x, weight, bias).reshape(1, -1, weight.shape[0])

        def any_block(block: int, hidden: Tensor, /, *args: Any, **kwargs: Any) -> Any:
            return self._wrap_output[block](hidden)

        self._recorded_calls((1, 1))
        ids = torch.zeros(1, 1, dtype=torch.int64)
        logits = self._run_outer(self._constant_parameters(0.0), None, ids, any_block, lambda _: raw)
        return logits.reshape(*x.shape[:-1], weight.shape[0])

    # --- the model without its blocks ---------------------------------------------------------------------------------

    def _check_parameters(self) -> list[str]:
        """The model's parameters. Raises `UnsupportedModelError` for one that is no tensor of the checkpoint."""
        parameters = [name for name, _ in self._model.named_parameters()]
        missing = [name for name in parameters if name not in self.checkpoint_names and name not in self.moe_experts]
        if missing:
            raise UnsupportedModelError(
                f"expected a tensor of the checkpoint for every parameter of {self._type}, found none for "
                f"{len(missing)} of {len(parameters)}: {missing[0]}",
                hint=_HINT,
            )
        return parameters

    def _replace_modules(self, paths: dict[int, str], head: nn.Module) -> None:
        """Takes blocks and head out of the model and puts placeholders in their places."""
        blocks = self._find_blocks()
        self.blocks_path, self._blocks = paths[id(blocks)], list(blocks)
        # What a block returns for given hidden states: they alone, or a tuple that begins with them.
        self._wrap_output: list[Callable[[Tensor], Any]] = [lambda hidden: hidden] * len(self._blocks)
        self._on_block: Callable[..., Any] = lambda block, hidden: hidden
        self._on_head: Callable[[Tensor], Any] = lambda x: x

        def call_block(block: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._on_block(block, *args, **kwargs)

        placeholders = nn.ModuleList([_Placeholder(block, call_block(i)) for i, block in enumerate(self._blocks)])
        self._replace_module(self.blocks_path, placeholders)
        self._replace_module(paths[id(head)], _Placeholder(head, lambda x: self._on_head(x)))

    def _find_blocks(self) -> nn.ModuleList:
        """The outermost list of as many modules as the config has layers."""
        lists = [m for m in self._model.modules() if isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())]
        nested = {id(m) for a in lists for m in a.modules() if m is not a}
        depth = getattr(self._model.config.get_text_config(), "num_hidden_layers", None)
        candidates = [m for m in lists if id(m) not in nested and len(m) == depth]
        if len(candidates) != 1:
            raise UnsupportedModelError(
                f"expected one list of {depth} blocks in {self._type}, found {len(candidates)}", hint=_HINT
            )
        return candidates[0]

    def _replace_module(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        self._model.get_submodule(parent)._modules[name] = module

    def _run_outer(
        self,
        outer: dict[str, Tensor],
        embedding: Tensor | None,
        ids: Tensor,
        on_block: Callable[..., Any],
        on_head: Callable[[Tensor], Any] = lambda x: x,
    ) -> Tensor:
        """Runs the model with these functions for its blocks and head; returns what they captured, or the logits.

        `embedding [n, hidden]`: the rows that `ids` index; `None` for a row of zeros.
        """
        if embedding is None:
            embedding = self._constant(self.embedding_parameter, 0.0)[:1]
        self._on_block, self._on_head = on_block, on_head
        parameters = {**outer, self.embedding_parameter: embedding}
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        try:
            logits: Tensor = functional_call(self._model, parameters, kwargs=inputs).logits
            return logits
        except _Captured as captured:
            return captured.tensor

    def _constant(self, parameter: str, value: float) -> Tensor:
        """A tensor of the parameter's shape and dtype, all entries of which are `value`; takes no memory."""
        own = self._model.state_dict()[parameter]
        return torch.full((), value, dtype=own.dtype).expand(own.shape)

    def _constant_parameters(self, value: float) -> dict[str, Tensor]:
        return {parameter: self._constant(parameter, value) for parameter in self._outer_names}

    # --- how blocks are called ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _recorded_calls(self, shape: tuple[int, int]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of every block after its hidden states, for `shape = (windows, length)`.

        Recorded twice, with different parameters and hidden states. Raises `UnsupportedModelError` if the arguments
        depend on those.
        """
        if shape not in self._calls:
            calls, others = self._record_calls(shape, 0.0), self._record_calls(shape, 1.0)
            for block, (call, other) in enumerate(zip(calls, others, strict=True)):
                if not _equal(call, other):
                    raise UnsupportedModelError(
                        "expected blocks that are called alike on any text, "
                        f"found block {block} otherwise: {self._type}",
                        hint=_HINT,
                    )
            self._calls[shape] = calls
        return self._calls[shape]

    def _record_calls(self, shape: tuple[int, int], value: float) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """One recording; `value` fills all parameters and is added to the hidden states by every block."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(block: int, /, *args: Any, **kwargs: Any) -> Any:
            if not args and "hidden_states" in kwargs:
                args = (kwargs.pop("hidden_states"),)
            hidden, rest = args[0], args[1:]
            calls.append((rest, kwargs))
            self._wrap_output[block] = self._output_wrapper(block, hidden, rest, kwargs)
            return self._wrap_output[block](hidden + value)

        ids = torch.zeros(shape, dtype=torch.int64)
        embedding = self._constant(self.embedding_parameter, value)[:1]
        self._run_outer(self._constant_parameters(value), embedding, ids, record)
        if len(calls) != len(self._blocks):
            raise UnsupportedModelError(
                f"expected {len(self._blocks)} blocks to run one after the other, found {len(calls)}: {self._type}",
                hint=_HINT,
            )
        return calls

    def _output_wrapper(self, block: int, hidden: Tensor, args: Any, kwargs: Any) -> Callable[[Tensor], Any]:
        """A function that returns hidden states in the form in which a block does; found on the meta device."""
        module = self._blocks[block]
        state = {name: tensor.to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())}
        try:
            output = functional_call(module, state, _to_meta((hidden, *args)), _to_meta(kwargs))
        except Exception as error:  # whatever a block does that the meta device cannot follow
            raise UnsupportedModelError(
                f"expected a block that takes its hidden states first, found block {block} of {self._type} to raise "
                f"{type(error).__name__}: {error}",
                hint=_HINT,
            ) from error
        return (lambda value: value) if isinstance(output, Tensor) else (lambda value: (value, *output[1:]))


def _copies(module: nn.Module, names: dict[str, str], weights: Weights) -> dict[str, Tensor]:
    """Copies of weights in the dtypes of the module's parameters; `names`: the checkpoint's by the module's."""
    state = module.state_dict()
    return {parameter: weights(name).to(state[parameter].dtype, copy=True) for parameter, name in names.items()}


def _stack(moe_experts: list[list[str]], own: Tensor, weights: Weights) -> Tensor:
    """The stack `own`, which has no memory, of the tensors of each MoE expert."""
    stack = torch.empty(own.shape, dtype=own.dtype)
    for part, tensors in zip(stack, moe_experts, strict=True):
        torch.cat([weights(tensor).to(own.dtype) for tensor in tensors], out=part)
    return stack


def _hidden_states(output: Any) -> Tensor:
    """The hidden states of a block's output."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _to_meta(value: Any) -> Any:
    """Nested tuples, lists and dictionaries with their tensors on the meta device."""
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_to_meta(item) for item in value)
    return {key: _to_meta(item) for key, item in value.items()} if isinstance(value, dict) else value


def _equal(one: Any, other: Any) -> bool:
    """Whether two recorded arguments are equal; objects with a state of their own (a cache) never are."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict):
        return bool(one) == bool(other) and one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    return isinstance(one, (type(None), bool, int, float, str)) and bool(one == other)


def _fill_buffers(model: Any) -> None:
    """Gives buffers (rotary frequencies, scales) memory and the values of the model's own initialisation."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        module._is_hf_initialized = not buffers
    model.initialize_weights()
