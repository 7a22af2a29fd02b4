"""The experts of one engine: their names, their settings, and which of them are resident.

    catalogue   an expert, and which names and folders are safe
    settings    configs, end of sequence and tokenizer of a model, as they were when it was opened
    files       the small files that these are read from, kept once where equal
    tokenizers  tokenizers, shared by content and by threads
    pool        names to opened deltas, and who uses them
    residency   which are resident under a byte budget; pins, slots

Threads: `ExpertPool` says which of its methods may be called from any thread; the rest belongs to the engine's.
Memory: a resident expert's bytes are its delta's; the pool closes a delta once it is removed and nobody uses it.

Imports: `delta`, `layers`, `huggingface`.
"""
