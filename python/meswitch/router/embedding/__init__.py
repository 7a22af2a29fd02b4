"""The embedding router: the base's own hidden states, a linear head, and two reasons to abstain.

pooling   prompts to embeddings, through the first half of the base's layers
head      principal components, logistic regression, distances, cross-validation
router    `EmbeddingRouter`: fit, route, add an expert
disk      the router's folder, checked as it is read
"""
