"""H = E[x xᵀ] of what every linear site sees, for the codec's error compensation, one block of the model at a time.

    windows of tokens ── embedding ── block 0 ── block 1 ── … ── head        the fine-tune, as `Decoder` streams it
                                         │
                                    Σ x xᵀ of each distinct input ── U, with H⁻¹ = UᵀU ── the codec, site by site

The codec walks the sites in the order in which the model runs them, so one block's sums are in memory at a time: four
squares for most models, of which that of the MLP's inner width is the largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meswitch.compression.calibration import weight_applied_first
from meswitch.huggingface.checkpoint import Checkpoint
from meswitch.huggingface.decoder import Decoder
from meswitch.huggingface.text import FORWARD_TOKENS, batches

_DAMPING = 0.01  # of the mean channel's second moment, to every channel


class Hessians:
    """Factors for the sites of `checkpoint`, from windows of tokens `int64 [length]`.

    Raises `UnsupportedModelError` for a model that cannot be streamed (see `Decoder`).
    """

    def __init__(self, checkpoint: Checkpoint, windows: Sequence[Tensor]) -> None:
        self._checkpoint = checkpoint
        self._decoder = decoder = Decoder(checkpoint.path, checkpoint.names())
        self._outer = decoder.outer_parameters(checkpoint.tensor)
        self._stacks, self._tokens = list(batches(list(windows), FORWARD_TOKENS)), sum(map(len, windows))
        self._block_of = {there: at for at in range(len(decoder)) for there in decoder.block_names(at).values()}
        if decoder.head != decoder.embedding:
            self._block_of[decoder.head] = len(decoder)
        self._asked: tuple[int, bytes] | None = None  # the last factor: sites that share an input ask in a row
        self._start()

    @torch.no_grad()
    def factor(self, site: str) -> bytes | None:
        """U of H⁻¹ = UᵀU as little-endian `float32 [in, in]`; none where nothing linear reads the site.

        The fewer tokens there are for a channel, the nearer H is taken to its diagonal.
        """
        block = self._block_of.get(site)
        if block is None:
            return None
        if block < self._next - 1:
            self._start()
        while self._next <= block:
            self._advance()
        number = self._input_of.get(site)
        if number is None:
            return None
        if self._asked is None or self._asked[0] != id(self._sums[number]):
            values = factor(self._sums[number] / self._tokens, self._tokens).numpy().tobytes()
            self._asked = id(self._sums[number]), values
        return self._asked[1]

    def _start(self) -> None:
        decoder, ids = self._decoder, torch.cat([stack.flatten() for stack in self._stacks]).unique()
        table = self._checkpoint.tensor(decoder.embedding)[ids].to(decoder.dtype)
        self._hidden = [decoder.embed(self._outer, ids, table, stack) for stack in self._stacks]
        self._next, self._sums, self._input_of = 0, [], {}  # type: int, list[Tensor], dict[str, int]

    def _advance(self) -> None:
        """Through the next block, adding up what its sites see; after the last one, what the head sees."""
        self._sums, self._input_of, self._asked = [], {}, None
        at, decoder = self._next, self._decoder
        self._next += 1
        if at == len(decoder):
            for some in self._hidden:
                self._add(decoder.head, decoder.head_input(self._outer, some))
            return
        names, parameters = decoder.block_names(at), decoder.block_parameters(at, self._checkpoint.tensor)
        last: list[tuple[Tensor, int]] = []  # the input seen last, and its sum

        def watch(site: str) -> object:
            def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if args[0].is_meta:
                    return
                if not last or last[0][0] is not args[0]:
                    last[:] = [(args[0], self._add(site, args[0]))]
                self._input_of.setdefault(site, last[0][1])

            return see

        handles = [
            module.register_forward_pre_hook(watch(names[f"{name}.weight"]))
            for name, module in decoder.block_module(at).named_modules()
            if weight_applied_first(module) == "weight" and f"{name}.weight" in names
        ]
        try:
            for number, some in enumerate(self._hidden):
                self._hidden[number] = decoder.run_block(at, parameters, some)
                last.clear()
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, site: str, x: Tensor) -> int:
        """Adds Σ x xᵀ to the sum that a site's input has; returns its number."""
        rows = x.reshape(-1, x.shape[-1]).float()
        number = self._input_of.setdefault(site, len(self._sums))
        if number == len(self._sums):
            self._sums.append(rows.T @ rows)
        else:
            self._sums[number].addmm_(rows.T, rows)
        return number


def factor(hessian: Tensor, tokens: int) -> Tensor:
    """The upper triangular U of H⁻¹ = UᵀU, `float32 [n, n]`, of a second moment seen over `tokens` tokens.

    H is first drawn towards its diagonal by n / (n + tokens), as an estimate from few tokens deserves, and damped.

    >>> [round(value, 3) for value in factor(torch.tensor([[4.0, 0.0], [0.0, 1.0]]), 1 << 30).diag().tolist()]
    [0.498, 0.988]
    """
    channels = len(hessian)
    own = hessian.diag().double()
    drawn = hessian.double().mul_(tokens / (channels + tokens))
    drawn.diagonal().copy_(own + (_DAMPING * own.mean()).clamp_min(torch.finfo(torch.float32).tiny))
    # With J turning the order round, J·H·J = L·Lᵀ gives H = M·Mᵀ for the upper triangular M = J·L·J: U is its inverse.
    upper = torch.linalg.cholesky(drawn.flip(0, 1)).flip(0, 1)
    del drawn
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(channels, dtype=torch.float64), upper=True)
    return inverse.float()
