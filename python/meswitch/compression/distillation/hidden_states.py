"""The hidden states of many windows of text, between two blocks of a model."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from meswitch.huggingface.decoder import Decoder

_MEMORY = 2**28  # bytes of a tensor that is kept in memory rather than in a file


class HiddenStates:
    """Hidden states `values float32 [windows, length, width]`, moved through one block after the other.

    `outer`: the model's parameters outside blocks. `embedding_rows` returns the embedding's rows of tokens `int64 [n]`.
    `ids int64 [windows, length]`. `batch`: windows that run at a time. `context`: tokens at the start of each window
    that `head_inputs` leaves out. `folder`: see `allocate`.
    """

    def __init__(
        self,
        decoder: Decoder,
        outer: dict[str, Tensor],
        embedding_rows: Callable[[Tensor], Tensor],
        ids: Tensor,
        batch: int,
        context: int,
        folder: Path,
    ) -> None:
        self._decoder, self._outer, self._batch, self._context = decoder, outer, batch, context
        tokens = ids.unique()
        rows, values = embedding_rows(tokens), None
        for start in range(0, len(ids), batch):
            embedded = decoder.embed(outer, tokens, rows, ids[start : start + batch])
            values = allocate((*ids.shape, embedded.shape[-1]), folder) if values is None else values
            values[start : start + batch] = embedded
        assert values is not None  # there is at least one window
        self.values: Tensor = values

    @torch.no_grad()
    def advance(self, block: int, parameters: dict[str, Tensor]) -> None:
        """Replaces the hidden states before `block` by those after it."""
        for values in self.values.split(self._batch):
            values.copy_(self._decoder.run_block(block, parameters, values))

    def head_inputs(self, numbers: Tensor) -> Tensor:
        """After the last block: the head's inputs for the scored tokens of the windows `numbers`, `[tokens, width]`."""
        scored = [self.values[batch][:, self._context :] for batch in numbers.split(self._batch)]
        inputs = [self._decoder.head_input(self._outer, values) for values in scored]
        return torch.cat(inputs).flatten(0, 1)


def allocate(shape: tuple[int, ...], folder: Path) -> Tensor:
    """An uninitialised float32 tensor: in memory, or above 256 MiB in an unlinked file in `folder`.

    The file's pages can be written back to disk where memory is short; it goes with the tensor.
    """
    if 4 * prod(shape) <= _MEMORY:
        return torch.empty(shape)
    path = folder / "hidden-states"
    tensor = torch.from_file(str(path), shared=True, size=prod(shape)).view(shape)
    path.unlink()
    return tensor
