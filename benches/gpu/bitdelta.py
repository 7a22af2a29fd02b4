"""The product of 1-bit deltas as BitDelta (arXiv 2402.10193) computes it: unpacked to ±1 in the product's own kernel.

A kernel of our own in Triton; where there is no Triton for the device, plain torch, which unpacks into memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# float16 throughout, as in BitDelta's own kernel; Triton's interpreter, which tests use, has no products of bfloat16.
SIGNS = 32  # of a word, along the columns
BLOCK_ROWS, BLOCK_COLUMNS, LEAST_TOKENS = 64, 128, 16  # of a weight; tokens of a tensor core's operand

if triton is not None:

    @triton.jit
    def _kernel(  # type: ignore[no-untyped-def]
        x, words, scales, y, rows, columns, block_rows: tl.constexpr, block_columns: tl.constexpr, tokens: tl.constexpr
    ):
        """`y[t, r] = scale_t · Σ_c (2 · bit − 1) · x[t, c]`; token t has the delta `words[t] [columns / 32, rows]`."""
        token = tl.program_id(1)
        row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
        own = words + token.to(tl.int64) * (columns // 32) * rows
        sums = tl.zeros((tokens, block_rows), dtype=tl.float32)
        first = tl.arange(0, tokens)[:, None] == 0
        for start in range(0, columns, block_columns):
            column = start + tl.arange(0, block_columns)
            there = (column[:, None] < columns) & (row[None, :] < rows)
            word = tl.load(own + (column // 32)[:, None] * rows + row[None, :], mask=there, other=0)
            sign = (((word >> (column % 32)[:, None]) & 1) * 2 - 1).to(tl.float16)
            value = tl.load(x + token * columns + column[None, :], mask=first & (column[None, :] < columns), other=0.0)
            sums += tl.dot(value, sign)
        total = tl.sum(sums, axis=0) * tl.load(scales + token)
        tl.store(y + token * rows + row, total, mask=row < rows)


class BitDelta:
    """As many random deltas `[rows, columns]` as there are tokens. `columns` is a multiple of 32."""

    def __init__(self, tokens: int, rows: int, columns: int, device: str) -> None:
        self.tokens, self.rows, self.columns = tokens, rows, columns
        generator = torch.Generator(device).manual_seed(0)
        shape = (tokens, columns // SIGNS, rows)
        words = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int64, device=device)
        self.words, self.scales = words.int(), torch.full((tokens,), 1e-4, device=device)
        self.way = "Triton" if triton is not None and device.startswith("cuda") else "torch"

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """`float16 [tokens, rows]` of `x float16 [tokens, columns]`, which is what BitDelta's kernel takes."""
        return self.by_triton(x) if self.way == "Triton" else self.by_torch(x)

    def by_triton(self, x: Tensor) -> Tensor:
        y = torch.empty(self.tokens, self.rows, dtype=torch.float16, device=x.device)
        grid = (triton.cdiv(self.rows, BLOCK_ROWS), self.tokens)
        blocks = BLOCK_ROWS, BLOCK_COLUMNS, LEAST_TOKENS
        _kernel[grid](x, self.words, self.scales, y, self.rows, self.columns, *blocks)
        return y

    def by_torch(self, x: Tensor) -> Tensor:
        shifts = torch.arange(SIGNS, dtype=torch.int32, device=x.device)[:, None]
        bits = (self.words[:, :, None, :] >> shifts) & 1
        signs = (bits * 2 - 1).to(x.dtype).view(self.tokens, self.columns, self.rows)
        return torch.bmm(x[:, None, :], signs)[:, 0] * self.scales[:, None].to(x.dtype)
