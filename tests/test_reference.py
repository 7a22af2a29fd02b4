"""Where packed codes lie, as docs/format.md says; `test_ops.py` holds the kernels to the same."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meswitch import reference

BITS = st.sampled_from(reference.BITS)
ROWS = st.integers(0, 70) | st.integers(200, 600)


def drawn(bits: int, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)


def padded(rows: int) -> int:
    """A part of at most 48 rows is padded to a multiple of 16, a larger one of 64."""
    return -(-rows // 16) * 16 if rows <= 48 else -(-rows // 64) * 64


@given(bits=BITS, rows=ROWS, columns=st.integers(1, 300), seed=st.integers(0, 2**31), data=st.data())
def test_what_was_packed_is_unpacked(bits: int, rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    codes = drawn(bits, rows, columns, seed)
    words = reference.pack(codes, bits)
    assert words.shape == (reference.row_bytes(bits, columns) * padded(rows) // 4,)
    assert torch.equal(reference.unpack(words, bits, rows, columns), codes)
    chosen = st.lists(st.integers(0, rows - 1), max_size=40) if rows else st.just([])
    wanted = torch.tensor(data.draw(chosen), dtype=torch.int64)
    assert torch.equal(reference.unpack(words, bits, rows, columns, wanted), codes[wanted])


@given(bits=BITS, rows=ROWS.filter(bool), columns=st.integers(1, 300), data=st.data())
def test_one_code_lies_where_the_format_says(bits: int, rows: int, columns: int, data: st.DataObject) -> None:
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    code = data.draw(st.integers(1, 2**bits - 1))
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    codes[row, column] = code
    packed = reference.pack(codes, bits).view(torch.uint8)
    row_bytes = bits * -(-columns // 8)
    start = row // 256 * 256
    width = min(256, padded(rows) - start)
    expected = torch.zeros_like(packed)
    pieces = [(2, code & 3, 0), (1, code >> 2, 2 * -(-columns // 8))] if bits == 3 else [(bits, code, 0)]
    for b, piece, first in pieces:
        byte = first + b * (column // 8) + b * (column % 8) // 8
        expected[start * row_bytes + byte * width + row - start] = piece << b * column % 8
    assert torch.equal(packed, expected)


def test_the_examples_of_the_format() -> None:
    for rows, row, at, size in ((70, 65, 67 * 128 + 65, 9728), (300, 270, 76 * 256 + 67 * 64 + 14, 24320)):
        codes = torch.zeros(rows, 300, dtype=torch.uint8)
        codes[row, 270] = 3
        packed = reference.pack(codes, 2).view(torch.uint8)
        assert (packed.nonzero().tolist(), int(packed[at]), len(packed)) == ([[at]], 0b110000, size)
