"""Arithmetic of mixed-expert batches: one protocol, one file a backend.

    layers ── Kernels (protocol) ─┬─ cpu      native kernels: lookup tables, fused and merged products
                                  └─ torch    plain torch on any device: unpack a tile, multiply
    reference.py is the truth of both; invariance keeps rows apart where arithmetic is exact

A step packs the tokens of many requests one after another. `Rows` says which slot each token belongs to, and an
operation adds to every token what the delta in its slot makes of it. Which product is quickest (base and delta merged,
fused, or one after the other; modules that share an input in one call) is a backend's own decision, and so is every
threshold: layers know none of them.

Threads: a backend object belongs to one engine, and everything here runs on that engine's thread. Memory: tensors of a
site stay the delta's; `cpu` reads them where they lie, `torch` copies them to its device.

Imports: `delta`, `site`, `reference`, and the arithmetic of `_native` (in `cpu` and `rows` alone).
"""
