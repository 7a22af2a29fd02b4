"""The experts of one engine: their names, their settings, and which of them are resident.

    catalogue   an expert, and which names and folders are safe
    settings    configs, end of sequence and tokenizer of a model, as they were when it was opened
    files       the small files that these are read from, kept once where equal
    tokenizers  tokenizers, shared by content and by threads
    pool        names to opened deltas, and who uses them
    residency   what the native residency has loaded, in the layers; slots
    device      the same where the layers are on a device: a second residency over the first
    failure     why an expert cannot be served, and when it is tried again
    counts      what the requests for an expert have come to
    watch       a folder of experts that is followed

Threads: `ExpertPool` may be used from any; `Residency` says which of its methods belong to the engine's.
Memory: a resident expert's tensors are the native residency's, under its budget; the pool closes a delta once it is
removed and nobody uses it.

Imports: `delta`, `layers`, `huggingface`.
"""
