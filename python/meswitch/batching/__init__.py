"""Continuous batching of requests for different experts, on transformers' own paged cache.

    bridge          transformers' internals: the only file that imports them; requests in one batch, a step at a time
    step            what an attention function is told of a step, and the tokens that come of it
    scheduler       which request runs in a step, and the slot of every packed token
    prefill         how much of a prompt a step takes while other requests decode
    sampler         each request's own logits processors and random generator
    cache           how many bytes a KV cache of so many tokens takes
    attention       attention over the paged cache, each request over its own keys
    signatures      how transformers' functions are called, compared with what is installed
    compatibility   which versions of transformers and which models can be served: proved on a tiny model at start

    compatibility ─┬─ scheduler, sampler, cache, signatures ── bridge ── step
                   └─ attention ── step

Threads: everything runs on the engine's thread. Memory: the KV cache and a step's tensors are transformers'.

Imports: `errors`.
"""
