"""H = E[x xᵀ] of the inputs of every linear site, for the codec's error compensation; one block in memory at a time.

    windows of tokens ── embedding ── block 0 ── block 1 ── … ── head        the fine-tune, run by `Decoder`
                                         │
                                    Σ x xᵀ of each distinct input ── U, with H⁻¹ = UᵀU ── the codec, site by site

The codec visits sites in the order in which the model runs them, so the sums of one block are in memory at a time: four
square matrices for most models, the largest of which has the MLP's inner width.

Each MoE expert has an H of its own, of the tokens that its gate sends to it. A block's would take more memory than the
block, so the rows that MoE experts read are kept instead, and H is made when its site is asked for. That is at most
tokens × MoE experts a token × (hidden width + inner width) floats, however many MoE experts there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from meswitch.compression.calibration import input_weight_name
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder
from meswitch.huggingface.moe import ObservedExperts, Observer, input_stack
from meswitch.huggingface.text import FORWARD_TOKENS, batches

MoeExpert: TypeAlias = tuple[str, int]
"""A stack, by its name in the model, and the number of a MoE expert in it."""

_DAMPING = 0.01  # of the mean channel's second moment, added to every channel


class Hessians:
    """The inverse factors U of H for the sites of `checkpoint`, over windows of tokens `int64 [length]`.

    Sites may be asked for in any order, but only the order of the model runs every block once.
    Raises `UnsupportedModelError` for a model that cannot be run a block at a time (see `Decoder`).
    """

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Tensor]) -> None:
        self._checkpoint = checkpoint
        self._decoder = decoder = Decoder(checkpoint.path, checkpoint.names())
        self._outer = decoder.outer_parameters(checkpoint.tensor)
        self._batches, self._tokens = list(batches(list(windows), FORWARD_TOKENS)), sum(map(len, windows))
        self._block_of = {name: block for block in range(len(decoder)) for name in decoder.block_names(block).values()}
        for ids in self._batches:
            decoder.check(ids)
        self._stack_of = {
            name: (parameter, moe_expert)
            for parameter, experts in decoder.moe_experts.items()
            for moe_expert, names in enumerate(experts)
            for name in names
        }
        for name, (parameter, _) in self._stack_of.items():
            self._block_of[name] = int(parameter.removeprefix(f"{decoder.blocks_path}.").partition(".")[0])
        if decoder.head != decoder.embedding:
            self._block_of[decoder.head] = len(decoder)
        # The last factor's input and its bytes, since sites that share an input follow one another.
        self._last_factor: tuple[int | MoeExpert, bytes] | None = None
        self._restart()

    @torch.no_grad()
    def factor(self, site: str) -> bytes | None:
        """U of H⁻¹ = UᵀU as little-endian `float32 [in, in]`; `None` for a site whose input is not known.

        That is a site which is neither a linear module's nor a MoE expert's, or a MoE expert's that no token reached.
        The fewer tokens there are for a channel, the more H is shrunk towards its diagonal (see `inverse_factor`).
        """
        block = self._block_of.get(site)
        if block is None:
            return None
        if block < self._next_block - 1:
            self._restart()
        while self._next_block <= block:
            self._run_next_block()
        source = self._stack_of.get(site, self._input_of.get(site))
        if source is None or (isinstance(source, tuple) and source not in self._routed):
            return None
        if self._last_factor is None or self._last_factor[0] != source:
            self._last_factor = source, inverse_factor(*self._hessian(source)).numpy().tobytes()
        return self._last_factor[1]

    def _hessian(self, source: int | MoeExpert) -> tuple[Tensor, int]:
        """H of an input, and over how many tokens: of the block, or of those that reach one MoE expert."""
        if isinstance(source, int):
            return self._sums[source] / self._tokens, self._tokens
        rows = torch.cat(self._routed[source]).float()
        return rows.T @ rows / len(rows), len(rows)

    def _restart(self) -> None:
        """Back to the hidden states before the first block."""
        decoder, tokens = self._decoder, torch.cat([ids.flatten() for ids in self._batches]).unique()
        rows = self._checkpoint.tensor(decoder.embedding)[tokens].to(decoder.dtype)
        self._hidden = [decoder.embed(self._outer, tokens, rows, ids) for ids in self._batches]
        self._next_block = 0
        self._clear_sums()

    def _clear_sums(self) -> None:
        self._sums: list[Tensor] = []  # Σ x xᵀ of each distinct input
        self._input_of: dict[str, int] = {}  # the number of a site's input in `_sums`
        self._routed: dict[MoeExpert, list[Tensor]] = {}  # the rows that each MoE expert of a stack reads
        self._last_factor = None

    def _run_next_block(self) -> None:
        """Runs the next block and sums over the inputs of its sites; after the last block, over those of the head."""
        self._clear_sums()
        block, decoder = self._next_block, self._decoder
        self._next_block += 1
        if block == len(decoder):
            for hidden in self._hidden:
                self._add(decoder.head, decoder.head_input(self._outer, hidden))
            return
        names, parameters = decoder.block_names(block), decoder.block_parameters(block, self._checkpoint.tensor)
        last_input: list[tuple[Tensor, int]] = []  # the input of the module that ran last, and its number
        handles: list[Any] = []
        for name, module in decoder.block_module(block).named_modules():
            if input_weight_name(module) == "weight" and f"{name}.weight" in names:
                handles.append(module.register_forward_pre_hook(self._hook(names[f"{name}.weight"], last_input)))
            elif input_stack(module) is not None:
                handles.append(ObservedExperts(module, self._observer(f"{decoder.blocks_path}.{block}.{name}")))
        try:
            for number, hidden in enumerate(self._hidden):
                self._hidden[number] = decoder.run_block(block, parameters, hidden)
                last_input.clear()
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: str, last_input: list[tuple[Tensor, int]]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A hook that adds a module's input, unless it is the tensor that the module before it got (q, k, v)."""

        def before_forward(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if x.is_meta:
                return
            if not last_input or last_input[0][0] is not x:
                last_input[:] = [(x, self._add(site, x))]
            self._input_of.setdefault(site, last_input[0][1])

        return before_forward

    def _observer(self, name: str) -> Observer:
        """Keeps the rows that MoE experts of the module `name` read, if they are sites of their own."""

        def observe(stack: str, moe_expert: int, x: Tensor, y: Tensor) -> None:
            if f"{name}.{stack}" in self._decoder.moe_experts:
                self._routed.setdefault((f"{name}.{stack}", moe_expert), []).append(x)

        return observe

    def _add(self, site: str, x: Tensor) -> int:
        """Adds Σ x xᵀ to the sum of a site's input; returns the number of that input."""
        rows = x.reshape(-1, x.shape[-1]).float()
        number = self._input_of.setdefault(site, len(self._sums))
        if number == len(self._sums):
            self._sums.append(rows.T @ rows)
        else:
            self._sums[number].addmm_(rows.T, rows)
        return number


def inverse_factor(hessian: Tensor, tokens: int) -> Tensor:
    """The upper triangular U of H⁻¹ = UᵀU, `float32 [n, n]`, of H `[n, n]` that was measured over `tokens` tokens.

    H is first shrunk towards its diagonal by n / (n + tokens), since few tokens estimate it badly, and then damped.

    >>> hessian = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    >>> [round(value, 3) for value in inverse_factor(hessian, 1 << 30).diag().tolist()]
    [0.498, 0.988]
    """
    channels = len(hessian)
    diagonal = hessian.diag().double()
    shrunk = hessian.double().mul_(tokens / (channels + tokens))
    shrunk.diagonal().copy_(diagonal + (_DAMPING * diagonal.mean()).clamp_min(torch.finfo(torch.float32).tiny))
    # With J reversing the order, J·H·J = L·Lᵀ gives H = M·Mᵀ for the upper triangular M = J·L·J, and U is its inverse.
    upper = torch.linalg.cholesky(shrunk.flip(0, 1)).flip(0, 1)
    del shrunk
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(channels, dtype=torch.float64), upper=True)
    return inverse.float()
