"""Small families of models to try things on, and a tour of the library with them or with models of your own.

    family        `family`: the family of a name, trained where the cache has none
    paths         `Family`: where its models and texts lie
    tiny, moe, smol    how each family is made
    training      batches, AdamW, files
    corpus        text in three domains, train and held out
    sources, problems, openings, conversations    where that text comes from, and its forms

    tour          `run`: everything of `meswitch demo`
    subject       the models of a tour and the text about them
    steps         compress, evaluate, route      serving    one mixed batch
    report        what is printed at the end

Threads: a training or a tour runs on the calling thread; two at once share the cache under a lock.

Imports: `compression`, `engine`, `router`, `delta`, `terminal`, `huggingface`, `progress`.
"""
