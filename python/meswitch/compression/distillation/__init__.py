"""Distillation of the scales: a delta's codes stay, and its scales are trained to predict as the fine-tune does.

Row scales, column scales and `u` are trained as stored value · exp(θ), all sites at once on the fine-tune's logits, or
block by block on its hidden states. The next tokens of the text itself count a little beside its logits. Held-out text
picks the best scales, rounded to the float16 that is stored, by KL(fine-tune ‖ expert); the result is never worse there
than the delta was before.

    job       `distill`, from arguments to the delta directory      options   its options
    windows   the text, in windows to train on and to measure on

    whole_model   all sites at once; two models in float32          blockwise    one block after the other
    scales        the trainable scales of one site                  hidden_states        between two blocks
    expert_weight a parameter rebuilt from trainable scales         fisher_information   what errors there cost
    optimizer     Adam, with the best result kept                   head_divergence      KL without all logits
    bfloat16_gradients   quicker backward products                  journal      finished blocks on disk

Sources: row and column scales trained jointly, arXiv 2512.19720; the scales of one-bit deltas trained at all, arXiv
2402.10193; the text itself beside a teacher's predictions, arXiv 1503.02531, section 2.

Threads: everything runs on the caller's thread. Memory: see `DistillOptions.method`.
"""
