"""One model whose MoE experts do not all fit in memory: those that are missing are read, or gates do without them.

    extents   where each MoE expert of a checkpoint lies in its files
    trunk     the model without its MoE experts
    store     those that are in memory, under a byte budget
    exact     the forward of a module of MoE experts over a store: bit for bit that of the whole model

    copies    low-bit copies of MoE experts, out of a quantized model
    fallback  a forward that has the copies answer for light choices that are not in memory

    gate      which MoE experts a gate may choose: those that are resident
    virtual   which ones should be: SwapMoE's virtual experts (arXiv 2308.15030)
    resident  what keeps them in memory, and reads others in the background
    packed    the same in few bits, out of a quantized model
    swaps     virtual experts while an engine runs: resident sets that follow what is asked
    profile   what text asks of each MoE expert, measured once for a task

Threads: counters may be read from any; everything else is the engine's thread's. Memory: slots are the native store's,
and tensors over one must not outlive its visit, or what is kept.

Imports: `layers`, `kernels`, `delta`, `huggingface`, `progress`, `_native`.
"""
