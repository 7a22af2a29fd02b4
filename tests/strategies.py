"""Sites of any shape, for tests that compare a fast path with `reference.py`."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from meswitch import reference
from meswitch.site import LowRank, Part, QuantizedSite, Salient, Sparse


@st.composite
def sites(draw: st.DrawFn, like: QuantizedSite | None = None) -> QuantizedSite:
    """A quantized site of any shape, or of the shape of another, with any of the codec's parts."""
    if like is None:
        out = draw(st.integers(1, 70) | st.integers(200, 600))  # a block of packed rows has 256, a line 64
        columns = draw(st.integers(1, 700))
    else:
        out, columns = like.shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    halves = lambda *shape: torch.randn(*shape, generator=generator).half()  # noqa: E731
    widths = draw(st.lists(st.sampled_from(reference.BITS), min_size=0, max_size=3, unique=True))
    size = draw(st.one_of(st.none(), st.integers(1, columns)))
    whole = len(widths) == 1 and draw(st.booleans())
    owner = torch.randint(0, len(widths) + 1, (out,), generator=generator)
    parts = []
    for at, bits in enumerate(widths):
        rows = torch.arange(out) if whole else (owner == at).nonzero().squeeze(1)
        codes = torch.randint(0, 2**bits, (len(rows), columns), generator=generator).to(torch.uint8)
        zero = draw(st.sampled_from([(2**bits - 1) / 2, float(2 ** (bits - 1))]))
        groups = 1 if size is None else -(-columns // size)
        own = None if whole else rows.int()
        parts.append(Part(bits, zero, reference.pack(codes, bits), halves(groups, len(rows)), size, own))
    salient, rank = draw(st.integers(0, min(4, columns))), draw(st.integers(0, 3))
    chosen = torch.randperm(columns, generator=generator)[:salient].sort().values.int()
    return QuantizedSite(
        name="drawn",
        shape=(out, columns),
        dtype=torch.float32,
        parts=tuple(parts),
        column_scales=halves(columns) if draw(st.booleans()) else None,
        salient=Salient(chosen, halves(out, salient)) if salient else None,
        low_rank=LowRank(halves(out, rank), halves(rank, columns)) if rank else None,
        exponent=draw(st.integers(-8, 3)),
    )


@st.composite
def sparse_sites(draw: st.DrawFn) -> QuantizedSite:
    """A sparse site of any shape: empty rows, one row, no entries, gaps to bridge, several entries of a column."""
    out, columns = draw(st.integers(1, 40)), draw(st.integers(1, 900))
    density = draw(st.sampled_from([0.0, 0.003, 0.05, 0.5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ends, gaps = [0], []
    for row in range(out):
        chosen = (torch.rand(columns, generator=generator) < density).nonzero().squeeze(1)
        if row % 3 == 1:  # every column of it twice
            chosen = chosen.repeat_interleave(2)
        steps = torch.diff(chosen, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
        for step in steps:
            gaps += [255] * (step // 255) + [step % 255]
        ends.append(len(gaps))
    values = torch.randn(len(gaps), generator=generator)
    tensors = torch.tensor(ends).int(), torch.tensor(gaps, dtype=torch.uint8), values.to(torch.float8_e5m2)
    exponent = draw(st.integers(-20, 3))
    shape, sparse = (out, columns), Sparse(*tensors)
    return QuantizedSite(name="drawn", shape=shape, dtype=torch.float32, sparse=sparse, exponent=exponent)
