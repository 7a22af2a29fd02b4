"""The engine over a quantized base beside llama.cpp with a Q4_K_M file of each fine-tune, taking turns in one run.

    python benches/llama.py --folder DIR [--shapes llama-1b] [--bits 4] [--preset default --preset small]
                            [--experts 8] [--tokens 24] [--rounds 5]

Synthetic weights of a real model's shapes (speed does not look at values). *One stream*: tokens a second of one request
after its first token. *Mixed*: one request for each of several experts, in one batch here, one loaded model after the
other there. *Switch*: seconds until the first token of a request for an expert whose files are in the page cache and
that is not in memory yet, here read into memory, there mapped. Medians of rounds, ratios of medians.

llama.cpp runs in a process of its own, which sleeps while the engine has its turn, and the other way round. It is a
package, and no dependency of ours; llama-cpp-python compiles for the machine that it is installed on.

    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install llama-cpp-python gguf
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from compress import SHAPES
from engine import PROMPT, ask, seconds
from quantized import parser_of, prepare, token_seconds

from meswitch.engine.engine import Engine
from meswitch.huggingface.checkpoint import Checkpoint

Q4_K_M = 15  # in `enum llama_ftype`
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path, file: Path) -> None:
    """The weights of a Llama checkpoint as a GGUF file of 16 bits, without a vocabulary."""
    import gguf

    checkpoint = Checkpoint(folder)
    config, writer = checkpoint.config, gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        values = tensor.float().numpy() if tensor.dim() == 1 else tensor.half().numpy()
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{PARTS[part.removesuffix('.weight')]}.weight"


def quantize_gguf(source: Path, out: Path) -> None:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = Q4_K_M
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    if failed:
        raise SystemExit(f"llama.cpp could not quantize {source}: {failed}")


class Llama:
    """A loaded model of llama.cpp."""

    def __init__(self, file: Path, vocabulary: int, threads: int) -> None:
        import llama_cpp

        self.api, self.vocabulary = llama_cpp, vocabulary
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_threads, settings.n_threads_batch = 512, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)

    def close(self) -> None:
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def decode(self, tokens: list[int]) -> int:
        """Runs tokens after those before; the likeliest next one."""
        array = (self.api.llama_token * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("llama.cpp could not decode")
        logits = np.ctypeslib.as_array(self.api.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
        return int(logits.argmax())

    def answer(self, prompt: list[int], tokens: int) -> float:
        """Seconds a token after the first one."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        token = self.decode(prompt)
        start = time.perf_counter()
        for _ in range(tokens - 1):
            token = self.decode([token])
        return (time.perf_counter() - start) / (tokens - 1)


def peer(connection: Connection, file: Path, vocabulary: int, threads: int) -> None:
    """The process of llama.cpp: answers `("token", count)` and `("switch", 0)` with seconds, until it gets `None`."""
    import llama_cpp

    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = Llama(file, vocabulary, threads)
    while (asked := connection.recv()) is not None:
        kind, count = asked
        if kind == "token":
            connection.send(model.answer(PROMPT, count))
            continue
        start = time.perf_counter()
        other = Llama(file, vocabulary, threads)
        other.decode(PROMPT)
        connection.send(time.perf_counter() - start)
        other.close()


@contextmanager
def started(file: Path, vocabulary: int, threads: int) -> Iterator[Any]:
    """A function that asks the other process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=peer, args=(theirs, file, vocabulary, threads))
    process.start()

    def asked(kind: str, count: int = 0) -> float:
        ours.send((kind, count))
        answer: float = ours.recv()
        return answer

    try:
        yield asked
    finally:
        ours.send(None)
        process.join()


def measure(root: Path, bits: int, preset: str, experts: int, tokens: int, rounds: int, asked: Any) -> dict[str, Any]:
    names = [f"expert-{at}" for at in range(experts)]
    folders = {name: root / f"{preset}-{bits}bit" / name for name in names}
    spent: dict[str, list[float]] = {}
    with Engine(root / f"base-{bits}bit", folders) as engine:
        first = 10  # of a prompt, another one each time so that nothing is cached
        for _ in range(rounds + 1):  # the first is not counted
            spent.setdefault("one stream", []).append(token_seconds(engine, names[:1], tokens))
            spent.setdefault("mixed", []).append(token_seconds(engine, names, tokens) / experts)
            for name in names[:2]:  # replaced by itself: the next request finds it on the disk
                engine.add_expert(name, folders[name])
                first += 1
                prompt = [first, *PROMPT[1:]]
                spent.setdefault("switch", []).append(seconds(lambda p=prompt, n=name: ask(engine, p, [n], 1)))
            spent.setdefault("llama.cpp, one stream", []).append(asked("token", tokens))
            spent.setdefault("llama.cpp, switch", []).append(asked("switch"))
    time_of = {case: statistics.median(some[len(some) // (rounds + 1) :]) for case, some in spent.items()}
    own = "llama.cpp, one stream"
    return {
        "tokens_per_second": {case: round(1 / time_of[case], 2) for case in ("one stream", "mixed", own)},
        "one stream / llama.cpp": round(time_of[own] / time_of["one stream"], 3),
        "mixed / llama.cpp": round(time_of[own] / time_of["mixed"], 3),
        "switch": {case: round(time_of[case], 3) for case in ("switch", "llama.cpp, switch")},
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    root, presets = arguments.folder, arguments.preset or ["default", "small"]
    prepare(root, arguments.shapes, arguments.bits, presets, arguments.experts)
    file = root / "finetune-Q4_K_M.gguf"
    if not file.exists():
        write_gguf(root / "finetune", root / "finetune.gguf")
        quantize_gguf(root / "finetune.gguf", file)
    print(json.dumps({"gguf_bytes": file.stat().st_size}))
    with started(file, SHAPES[arguments.shapes].vocabulary, arguments.threads) as asked:
        for preset in presets:
            found = measure(root, arguments.bits, preset, arguments.experts, arguments.tokens, arguments.rounds, asked)
            print(json.dumps({"shapes": arguments.shapes, "preset": preset} | found), flush=True)


if __name__ == "__main__":
    main()
