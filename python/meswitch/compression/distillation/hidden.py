"""The hidden states of many windows, between two blocks."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from meswitch.huggingface.decoder import Decoder

_MEMORY = 2**28  # bytes


class Stream:
    """`hidden float32 [windows, length, width]`, made and moved on `batch` windows at a time.

    `ids int64 [windows, length]`, of which the first `context` are not asked about; `table` gives the embedding's rows
    of the tokens it is handed; `folder`: see `room`.
    """

    def __init__(
        self,
        decoder: Decoder,
        outer: dict[str, Tensor],
        table: Callable[[Tensor], Tensor],
        ids: Tensor,
        batch: int,
        context: int,
        folder: Path,
    ) -> None:
        self._decoder, self._batch, self._context = decoder, batch, context
        rows = ids.unique()
        weights, hidden = table(rows), None
        for at in range(0, len(ids), batch):
            some = decoder.enter(outer, rows, weights, ids[at : at + batch])
            hidden = room((*ids.shape, some.shape[-1]), folder) if hidden is None else hidden
            hidden[at : at + batch] = some
        assert hidden is not None  # there is at least one window
        self.hidden: Tensor = hidden

    @torch.no_grad()
    def advance(self, block: int, parameters: dict[str, Tensor]) -> None:
        """Through one block."""
        for some in self.hidden.split(self._batch):
            some.copy_(self._decoder.run(block, parameters, some))

    def end(self, outer: dict[str, Tensor], numbers: Tensor) -> Tensor:
        """What the head is asked of some windows, after the last block: `[tokens, width]`."""
        asked = [self.hidden[some][:, self._context :] for some in numbers.split(self._batch)]
        parts = [self._decoder.leave(outer, hidden) for hidden in asked]
        return torch.cat(parts).flatten(0, 1)


def room(shape: tuple[int, ...], folder: Path) -> Tensor:
    """Space for `float32` numbers: in memory, or from 256 MiB on in a file of `folder` that has no name any more."""
    if 4 * prod(shape) <= _MEMORY:
        return torch.empty(shape)
    path = folder / "stream"
    room = torch.from_file(str(path), shared=True, size=prod(shape)).view(shape)
    path.unlink()
    return room
