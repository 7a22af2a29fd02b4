"""Routers: which expert a query that names none should go to, or the base where none fits.

    route        a route, labelled prompts, the report on a router
    routers      load, train and evaluate a router of whatever kind
    embedding/   the base's own hidden states and a linear head

    router = load_router("router/", base="base/")
    router.route(["What is 17 * 23?"], embed)[0].expert

Threads: a fitted router is immutable and may be shared; `embed` runs the base and belongs on the thread that owns it.

Imports: `huggingface`, `progress`.
"""
