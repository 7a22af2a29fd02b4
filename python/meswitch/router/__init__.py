"""Routers: which expert a prompt that names none should go to, or the base where none fits.

    protocol     what the engine needs of a router, and what a router may ask of the base
    route        a route, labelled prompts, the report on a router
    base         the base as routers ask it: embeddings of prompts
    routers      load, train and evaluate a router of whatever kind
    kinds        every kind of router: how it is trained and loaded, what it asks of the base
    folder       a router's folder on disk
    embedding/   one kind: the base's own hidden states and a linear head

    router = load_router("router/", base="base/")
    router.route(["What is 17 * 23?"], LoadedBase(model, tokenizer))[0].expert

The engine imports `protocol`, `route` and `base`, and `routers` where it is given a folder, but no kind of router.

Threads: a trained router is immutable and may be shared. It runs the base through the `BaseModel` it is handed, which
decides on which thread that is.

Imports: `huggingface`, `progress`.
"""
