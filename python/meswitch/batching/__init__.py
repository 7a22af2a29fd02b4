"""Continuous batching of requests for different experts, on transformers' own paged cache.

    bridge      transformers' internals: the only file that imports them
    scheduler   which request runs in a step, and the slot of every packed token
    sampler     each request's own logits processors and random generator
    cache       how many bytes a KV cache of so many tokens takes
    attention   attention over the paged cache, each request over its own keys

Threads: everything runs on the engine's thread. Memory: the KV cache and a step's tensors are transformers'.

Imports: `errors`.
"""
