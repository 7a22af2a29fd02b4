"""Delta directories: opening, verifying, and turning them back into ordinary parameters.

    directory     `Delta`, an opened delta directory: manifest, sites, checks
    entry         a site from its entry of the manifest and its tensors
    restoration   a site's parameter rebuilt from the base's; `restore` writes an ordinary checkpoint
    model         an expert as a model in memory
    target        where a delta directory may be written

Threads: an opened `Delta` may be read from any thread. Memory: an opened `Delta` holds no tensors. Those that are read
lie in memory of their own, which no file backs, and which is given back with the last of them; nobody may write to
them.

Imports: `huggingface`, `site`, `reference`, and the delta reader of `_native`.
"""
