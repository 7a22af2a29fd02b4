"""Delta directories: opening, verifying, and turning them back into ordinary parameters.

    directory     `Delta`, an opened delta directory: manifest, sites, checks
    restoration   a site's parameter rebuilt from the base's; `restore` writes an ordinary checkpoint
    model         an expert as a model in memory
    target        where a delta directory may be written

Threads: an opened `Delta` may be read from any thread. Memory: its tensors are views of the mapped file, which stays
mapped while any of them is alive; nobody may write to them.

Imports: `huggingface`, `site`, `reference`, and the delta reader of `_native`.
"""
