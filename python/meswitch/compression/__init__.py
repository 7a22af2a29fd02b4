"""From a fine-tune to a delta directory, and how good that is.

    job             `compress`: plans, allocation, and the native codec   options  what may be asked of it
    presets         a rule for each role of a parameter                    owners   which module owns a parameter
    plan            how one parameter is stored
    allocation      bits site by site under a target of bytes              forms    the ways to store one site
    calibration     E[x²] and token counts over text                       hessians E[x xᵀ], a block at a time
    sensitivity     what an error costs, in nats                           low_rank two thin factors
    evaluation      `evaluate`: NLL, KL, recovered share on held-out text
    lora, adapter   `import_adapter`: a LoRA of peft as a delta
    distillation/   `distill`: the scales tuned against the fine-tune

What each site gets is decided here; quantizing, hashing and writing are native.

Threads: these are jobs that a caller runs on its own thread; progress callbacks are called there too. Memory: one block
of a model or one site's codes at a time, whatever the model's size, unless a function says otherwise.

Imports: `delta`, `huggingface`, `site`, `reference`, `progress`, and the codec of `_native`.
"""
