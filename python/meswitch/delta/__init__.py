"""Delta directories: opened, verified, and turned back into ordinary parameters.

    directory     an opened delta: manifest, sites, checks
    restoration   a site's parameter on the base's own; `restore` writes an ordinary checkpoint
    model         an expert as a model in memory
    target        where a delta directory may be written

Threads: an opened `Delta` may be read from any thread. Memory: its tensors are views of the mapped file, alive as long
as somebody holds one; nobody writes to them.

Imports: `huggingface`, `site`, `reference`, and the delta reader of `_native`.
"""
