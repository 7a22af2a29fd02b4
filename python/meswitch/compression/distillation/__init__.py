"""Distillation of the scales: a delta's codes stay, its scales learn what the fine-tune would have said.

Row scales, column scales and `u` are trained as stored value · exp(θ), the whole model at once against the fine-tune's
logits, or block by block against its hidden states; the text's own next tokens count a little beside its logits. The
first gradients say at which rate, which falls to a tenth over the run. Text that is not trained on picks the best
scales seen, each rounded to the float16 that is stored, and judges the outcome by KL(fine-tune ‖ expert): it is never
worse there than what it started from.

    job ─ windows (text) ─┬─ whole   (two models in float32)      ─┬─ learner (one site's scales), descent (Adam)
                          └─ blocks  (one block of two models:     │
                                      hidden, heads, fisher,       │
                                      journal)                    ─┘  products (gradients in bfloat16)

Joint training of row and column scales: arXiv 2512.19720; training one-bit deltas' scales at all: arXiv 2402.10193;
a little of the text itself beside a teacher's answers: arXiv 1503.02531, section 2.
"""
