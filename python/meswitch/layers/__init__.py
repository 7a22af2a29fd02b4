"""Modules of the base that add an expert's delta to their own output, row by row.

    x [T, in] ── base module ──> y [T, out] ── += Δ̂ of slot(t) · x[t] ──> y
                                     │
                  Step: slot of every packed token and of every row that reaches lm_head, written before each forward

    ExpertLayers ── wrapper of a linear · head · embedding · vector · MoE experts · gate ── kernels
                    one file a kind

A module is changed on the instance only (its `forward`, or an embedding's class), when the first expert changes one of
its parameters, and restored when the last such expert leaves. Its own weights are never written.

Threads: everything runs on the engine's thread. Memory: a wrapper holds no copy of a delta; vectors and biases are
copied into one table a parameter (`Bank`), a row a slot. Layers know no backend: products, and how they are made, are
the kernels'.

Imports: `kernels`, `huggingface`, `site`, `reference`.
"""
