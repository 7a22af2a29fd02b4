"""The embedding router: the base's own hidden states, a linear head, and two reasons to abstain.

    router   `EmbeddingRouter`: fit, route, add an expert
    space    standardised principal components of embeddings, and distances in them
    head     logistic regression, and what cross-validation says of prompts that a head has not seen
    disk     what the router's folder holds, checked as it is read

Prompts become embeddings in `router.base`.
"""
