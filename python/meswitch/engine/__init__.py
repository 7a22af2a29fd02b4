"""One base and many experts answer requests in one batch.

    callers ── Engine ── preparation: prompt, expert, sampling ── Request ──> inbox
                                                                                │   one thread, which loaded the model
               TextStream, Answer <── Request.pieces <── text <── sample <── step <── admit

    engine        the façade                            worker     the thread that owns the model and runs every step
    preparation   prompts to requests, all checked      request    one prompt on its way, and its answer
    prompt        what callers pass, in one form        encoder    prompts to token ids
    text          token ids to text                     spaces     those that tokenizers leave out
    sampling      sampling settings, checked            stream     the text of a running request
    routing       who answers a prompt that names none  model      what is fixed once the base is loaded

Threads: callers' threads prepare requests and wait for answers. The engine's own thread loads the model, and only it
runs the model and enters torch's parallel regions: a second team of OpenMP threads in the process would slow down every
operation. Callers reach it through `Worker.submit`, `post` and `call`, which run between two steps.

Memory: the base and the KV cache belong to the worker and are freed by `Engine.close`; experts belong to the pool.

Imports: `batching`, `experts`, `layers`, `kernels`, `huggingface`, and no kind of router.
"""

from __future__ import annotations

from meswitch.engine.engine import Engine
from meswitch.engine.request import Answer
from meswitch.engine.stream import TextStream

__all__ = ["Answer", "Engine", "TextStream"]
