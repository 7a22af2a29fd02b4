"""From a fine-tune to a delta directory, and how good that is.

    job             `compress`: plans, allocation, and the native codec   options    its options
    presets         a rule for each role of a parameter                    owners     which module owns a parameter
    plan            how one parameter is stored
    allocation      bits site by site under a target of bytes              forms      the ways to store one site
    calibration     `calibrate`: E[x²] and token counts over text          hessians   E[x xᵀ], a block at a time
    sensitivity     `measure_sensitivity`: the cost of errors, in nats     low_rank   two thin factors
    moe_experts     statistics of single MoE experts                       moe_plan   what a MoE model takes in memory
    evaluation      `evaluate`: NLL, KL, recovered share                   likelihood sums of NLL and KL
    lora, adapter   `import_adapter`: a LoRA of peft as a delta
    distillation/   `distill`: the scales trained against the fine-tune
    sharing/        `share`: several fine-tunes of one MoE model within a budget

How each site is stored is decided here; quantizing, hashing and writing are native.

Threads: these are jobs that run on the caller's thread, as progress callbacks do. Memory: one block of a model or one
site's codes at a time, whatever the model's size, unless a function says otherwise.

Imports: `delta`, `huggingface`, `site`, `reference`, `progress`, and the codec of `_native`.
"""
