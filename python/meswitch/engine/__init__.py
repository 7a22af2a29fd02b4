"""One base and many experts answer requests in one batch.

    callers ── Engine ── preparation: prompt, expert, sampling ── Request ──> registry, admission
                                                                                │   one thread, which loaded the model
               TextStream, Answer <── Request <── text <── sample <── step <── admit

    engine        the façade                            worker     the thread that owns the model and runs every step
    preparation   prompts to requests, all checked      inbox      what other threads want done between two steps
    prompt        what callers pass, in one form        registry   every request that has not ended, and counts
    encoder       prompts to token ids                  admission  in which order requests enter the batch
    sampling      sampling settings, checked            request    one prompt on its way, and its answer
    routing       who answers a prompt that names none  text       token ids to text
    model         what is fixed once the base is loaded spaces     those that tokenizers leave out
    loading       a base, wrapped, batched and tried    stream     the text of a running request

Threads: callers' threads prepare requests, open experts and wait for answers. The engine's own thread loads the model,
and only it runs the model and enters torch's parallel regions: a second team of OpenMP threads in the process would
slow down every operation. Callers reach it through `Worker.submit` and the `Inbox`, whose jobs run between two steps,
of those that run the model one at a time. It waits for no lock that a caller holds for longer than a few operations.

Memory: the base and the KV cache belong to the worker and are freed by `Engine.close`; experts belong to the pool.

Imports: `batching`, `experts`, `layers`, `kernels`, `huggingface`, and no kind of router.
"""

from __future__ import annotations

from meswitch.engine.engine import Engine
from meswitch.engine.request import Answer
from meswitch.engine.stream import TextStream

__all__ = ["Answer", "Engine", "TextStream"]
