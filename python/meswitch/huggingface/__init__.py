"""What lies on disk in Hugging Face's forms, and what transformers makes of it.

    files        which small files belong to a checkpoint        config    which fields of a config change a model
    checkpoint   a folder's tensors, mapped                      names     one parameter's names: file, model, adapter
    models       a model, whole or not at all; its skeleton      decoder   a model run a block at a time
    text         data files, tokenizers, windows of tokens

One rule a question: whoever reads a checkpoint folder, loads a model or looks for a parameter does it through here.

Threads: nothing here is shared between threads unless it says so. Memory: a checkpoint's tensors are views of mapped
files; a loaded model belongs to its caller.

Imports: `errors` and the checkpoint reader of `_native`.
"""
