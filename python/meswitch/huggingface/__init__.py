"""Hugging Face checkpoints, text files and tokenizers, and the models that transformers builds from them.

    files        which small files belong to a checkpoint        config    which fields of a config change a model
    checkpoint   a folder's tensors, mapped                      names     one parameter's names: file, model, adapter
    pairing      base and fine-tune under one set of names         quantization   what is quantized, and so no input
    models       a model with all of its weights, or none        decoder   a model run a block at a time
    moe          MoE experts one after another, observed
    documents    data files to documents, line by line       text      tokenizers, windows of tokens

Every other package reads checkpoint folders, loads models and looks for parameters through this one.

Threads: no object here may be used by two threads at once, unless it says so. Memory: a checkpoint's tensors are views
of mapped files; a loaded model belongs to its caller.

Imports: `errors` and the checkpoint reader of `_native`.
"""
