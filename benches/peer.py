"""Our decode kernels beside llama.cpp's, taking turns in one run: GB/s of packed weights, and ratios.

    python benches/peer.py [--threads 2 1] [--rounds 15] [--bits 1 2 4]

One token times the weights of Mistral-7B's shapes. Ours are deltas of 1, 2 and 4 bits with a scale a row, or one for
128 columns; theirs are the GGML types nearest in bits, in every layout that the peer's processor backend offers for the
type: as in the file, and each that it makes of it at loading (`CPU_REPACK` and the like). Matrices are cycled through
half a gigabyte a kernel, so that weights come from memory; a pass reads 32 MiB of them, right after one that is not
counted, and again if a core was taken away in it. `read` is the machine's own rate: torch's sum of 64-bit words.

All kernels have a pass in every round (`quiet`: in how many no core was taken away). Medians of rounds are shown, and
ratios are medians of the rounds' own; above one, ours with a scale a row is the quicker (`ours/its GB/s` by the byte,
`its/ours us` by the product). Scales count as weights. Both sides take and give 32-bit floats, round activations to 8
bits in the timed part, and are first checked against the product of what their codes stand for.

Each side has a process of its own, since two OpenMP run-times in one would spin against each other; while one has its
turn the other waits for a message, and a pause before each turn lets its threads fall asleep.

The peer is a package that ships GGML's libraries, and no dependency of ours. llama-cpp-python compiles for the
machine that it is installed on; what GGML says it was compiled with is printed.

    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install llama-cpp-python
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from meswitch.kernels.rows import Rows
from meswitch.site import QuantizedSite

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
# By our bits: the peer's types, with their numbers in `enum ggml_type`. Its Q2_0 has no kernel on x86.
TYPES = {
    1: {"Q1_0": 41, "TQ1_0": 34},
    2: {"Q2_K": 10, "TQ2_0": 35, "IQ2_XXS": 16},
    4: {"Q4_0": 2, "Q4_K": 12},
}
# By what they add to a name: how many columns of ours share a scale; zero is the row.
GROUPS = {"": 0, " by 128": 128}
PACKAGE, MODULE = "llama-cpp-python", "llama_cpp"
INSTALL = f'CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install {PACKAGE}'
BYTES = 1 << 29  # of a kernel's matrices together
PASS = 1 << 25  # least bytes of a pass
TRIES = 5  # passes in which a core may be taken away before one counts nevertheless
PAUSE = 0.025  # seconds; libgomp's idle threads spin for as many as 20 milliseconds
CHECKED = 32  # rows that are checked; the peer's matrices repeat so many, since quantizing takes long
TOLERANCE = 0.03  # relative error that activations of 8 bits may bring
HEADER = (
    f"{'shape':>12} {'kernel':<20} {'bits/weight':>11} {'us':>8} {'GB/s':>6} {'read':>6} {'of read':>7} {'quiet':>6}"
    f" {'ours/its GB/s':>13} {'its/ours us':>11}"
)


@dataclass
class Cycle:
    """The matrices of one kernel, a window of them at a time."""

    windows: list[Callable[[], object]]
    products: int  # of a window
    nbytes: int  # of a window
    at: int = 0

    def step(self) -> float:
        window = self.windows[self.at]
        self.at = (self.at + 1) % len(self.windows)
        start = time.perf_counter()
        window()
        return time.perf_counter() - start


class Side:
    """One of the two processes: its kernels by name."""

    cycles: dict[str, Cycle]

    def __init__(self, threads: int) -> None: ...

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Products and bytes of a window, by kernel."""
        return {name: (cycle.products, cycle.nbytes) for name, cycle in self.cycles.items()}

    def turn(self, name: str) -> tuple[float, bool]:
        """Seconds of a window, and whether no core was taken away in it. The one before it wakes the threads."""
        cycle = self.cycles[name]
        for _ in range(TRIES):
            cycle.step()
            taken = preemptions()
            spent = cycle.step()
            if quiet := preemptions() == taken:
                break
        return spent, quiet


def preemptions() -> int:
    """Times that the processor was taken from this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def spread(size: int) -> tuple[int, int]:
    """For matrices of so many bytes: how many windows, and matrices in each."""
    count = -(-PASS // size)
    return BYTES // (count * size), count


class Ours(Side):
    """The `meswitch` kernels, called as `ops.delta_linear` calls them."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        # A bank for `read`, and one for each of our kernels: what one has read must not be in a cache for the next.
        self.memory = torch.randint(-(1 << 31), 1 << 31, (1 + len(GROUPS), BYTES // 4), dtype=torch.int32)

    def about(self) -> str:
        from meswitch import _native

        threads, shared = _native.kernel_threads()
        team = "torch's" if shared else "rayon's"
        title = f"meswitch {importlib.metadata.version('meswitch')}"
        return f"{title}: {_native.backend()}, {threads} threads of {team}"

    def load(self, bits: int, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        import torch

        from meswitch.reference import part_bytes

        size = part_bytes(bits, rows, columns)
        windows, count = spread(size)
        banks = self.memory[:, : windows * count * size // 4].view(len(self.memory), windows, count, -1)
        self.x, self.y = torch.randn(1, columns), torch.zeros(1, rows)
        self.cycles = {"read": Cycle([window.view(torch.int64).sum for window in banks[0]], count, count * size)}
        for (name, group), words in zip(GROUPS.items(), banks[1:], strict=True):
            self.cycles[f"ours, {bits}-bit{name}"] = self.cycle(bits, group or columns, words)
        return self.sizes()

    def cycle(self, bits: int, group: int, words: Any) -> Cycle:
        """Matrices of these codes `[windows, matrices, words]`, with a scale for so many columns."""
        import torch

        windows, count, _ = words.shape
        rows, columns, one = self.y.shape[1], self.x.shape[1], Rows([0])
        scales = torch.rand(windows, count, columns // group, rows).half()
        tables = [
            [table(bits, group, columns, *pair) for pair in zip(*of, strict=True)]
            for of in zip(words, scales, strict=True)
        ]
        x, y = self.x, self.y

        def run(window: list[Any]) -> None:
            for of in window:
                of.native.delta_linear(y, x, one.native, False)

        self.check(tables[0][0])
        nbytes = count * (4 * words.shape[-1] + 2 * rows * scales.shape[-2])
        return Cycle([lambda window=window: run(window) for window in tables], count, nbytes)

    def check(self, table: Any) -> None:
        import torch

        from meswitch.kernels import products as ops

        dense = torch.empty(CHECKED, table.in_features)
        table.matrix(0).dense(0, dense)
        ops.delta_linear(self.y.zero_(), self.x, Rows([0]), table)
        close("ours", self.y.numpy()[0, :CHECKED], dense.numpy() @ self.x.numpy()[0])


def table(bits: int, group: int, columns: int, codes: Any, scales: Any) -> Any:
    """A table with one delta of these codes in its slot 0."""
    import torch

    from meswitch.kernels import products as ops
    from meswitch.site import Part

    part = Part(bits, (2**bits - 1) / 2, codes, scales, group)
    site = QuantizedSite(name="weight", shape=(part.count, columns), dtype=torch.bfloat16, parts=(part,))
    of = ops.DeltaTable(part.count, columns)
    of.set(0, site)
    return of


def close(name: str, found: Any, expected: Any) -> None:
    error = float(((found - expected) ** 2).sum() / (expected**2).sum()) ** 0.5
    if not error < TOLERANCE:
        raise SystemExit(f"{name}: products are off by {error:.3f} of their size")


class Parameters(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", ctypes.c_bool))


class Feature(ctypes.Structure):
    """`ggml_backend_feature`; the list ends with an empty one."""

    _fields_ = (("name", c_char_p), ("value", c_char_p))


class Traits(ctypes.Structure):
    """`ggml_type_traits`, as far as it is read here."""

    _fields_ = (
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
SIGNATURES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_buffer_get_base": (c_void_p, c_void_p),
    "ggml_backend_buft_alloc_buffer": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_buft_name": (c_char_p, c_void_p),
    "ggml_backend_dev_buffer_type": (c_void_p, c_void_p),
    "ggml_backend_dev_init": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, c_void_p, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_load_all_from_path": (None, c_char_p),
    "ggml_backend_reg_by_name": (c_void_p, c_char_p),
    "ggml_backend_reg_dev_get": (c_void_p, c_void_p, c_size_t),
    "ggml_backend_reg_get_proc_address": (c_void_p, c_void_p, c_char_p),
    "ggml_backend_tensor_alloc": (c_int, c_void_p, c_void_p, c_void_p),
    "ggml_backend_tensor_get": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_free": (None, c_void_p),
    "ggml_get_type_traits": (ctypes.POINTER(Traits), c_int),
    "ggml_graph_overhead_custom": (c_size_t, c_size_t, ctypes.c_bool),
    "ggml_init": (c_void_p, Parameters),
    "ggml_log_set": (None, LOG, c_void_p),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, ctypes.c_bool),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_row_size": (c_size_t, c_int, c_int64),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_type_name": (c_char_p, c_int),
    "ggml_version": (c_char_p,),
}


@LOG
def log(level: int, text: bytes, _: object) -> None:
    """Shows ggml's warnings and errors; a line for each matrix that is laid out anew would be too much."""
    if level in (3, 4):
        print(text.decode(), end="", file=sys.stderr)


def find() -> Path | None:
    """Of the installed package's libraries, the one of GGML's that needs the others."""
    spec = importlib.util.find_spec(MODULE)
    folders = (spec and spec.submodule_search_locations) or ()
    found = (path for folder in folders for path in Path(folder).rglob("libggml.*") if path.suffix in (".so", ".dylib"))
    return next(found, None)


class Peer(Side):
    """llama.cpp's kernels: products of one graph on GGML's processor backend."""

    def __init__(self, threads: int) -> None:
        path = find() or sys.exit(INSTALL)
        self.ggml = ggml = ctypes.CDLL(str(path))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(ggml, name)
            function.restype, function.argtypes = result, arguments
        ggml.ggml_log_set(log, None)
        ggml.ggml_backend_load_all_from_path(str(path.parent).encode())  # where backends are files of their own
        self.registry = ggml.ggml_backend_reg_by_name(b"CPU")
        self.device = ggml.ggml_backend_reg_dev_get(self.registry, 0)
        self.backend = ggml.ggml_backend_dev_init(self.device, None)
        self.procedure("ggml_backend_set_n_threads", None, c_void_p, c_int)(self.backend, threads)
        self.title = f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, ggml {ggml.ggml_version().decode()}"
        self.threads = threads
        self.contexts: list[int] = []
        self.buffers: list[int] = []

    def procedure(self, name: str, *signature: Any) -> Any:
        address = self.ggml.ggml_backend_reg_get_proc_address(self.registry, name.encode())
        return ctypes.CFUNCTYPE(*signature)(address)

    def about(self) -> str:
        features = self.procedure("ggml_backend_get_features", ctypes.POINTER(Feature), c_void_p)(self.registry)
        names: list[str] = []
        while features[len(names)].name:
            names.append(features[len(names)].name.decode())
        return f"{self.title}: {' '.join(names)}, {self.threads} threads"

    def load(self, bits: int, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        import numpy as np

        for buffer in self.buffers:
            self.ggml.ggml_backend_buffer_free(buffer)
        for context in self.contexts:
            self.ggml.ggml_free(context)
        self.buffers, self.contexts, self.cycles = [], [], {}
        random = np.random.default_rng(0)
        self.x = random.standard_normal(columns, dtype=np.float32)
        self.weights = random.standard_normal((CHECKED, columns), dtype=np.float32)
        self.shape = rows, columns
        for name, kind in TYPES[bits].items():
            if (self.ggml.ggml_type_name(kind) or b"").decode().upper() == name:
                self.add(name, kind)
        return self.sizes()

    def layouts(self) -> Iterator[tuple[str, int]]:
        yield "", self.ggml.ggml_backend_dev_buffer_type(self.device)
        others = self.procedure("ggml_backend_dev_get_extra_bufts", ctypes.POINTER(c_void_p), c_void_p)(self.device)
        at = 0
        while others and others[at]:
            yield f" {self.ggml.ggml_backend_buft_name(others[at]).decode()}", others[at]
            at += 1

    def add(self, name: str, kind: int) -> None:
        """The cycles of a type, one for each layout that there is for it."""
        import numpy as np

        rows, columns = self.shape
        codes = np.empty((CHECKED, self.ggml.ggml_row_size(kind, columns)), dtype=np.uint8)
        importance = np.ones(columns, dtype=np.float32)
        self.ggml.ggml_quantize_chunk(
            kind, self.weights.ctypes.data, codes.ctypes.data, 0, CHECKED, columns, importance.ctypes.data
        )
        dense = np.empty_like(self.weights)
        self.ggml.ggml_get_type_traits(kind)[0].to_float(codes.ctypes.data, dense.ctypes.data, dense.size)
        matrix = np.tile(codes, (-(-rows // CHECKED), 1))[:rows]
        for layout, buft in self.layouts():
            made = self.cycle(kind, buft, matrix)
            if made is not None:
                self.cycles[name + layout] = made
                made.step()
                found = np.empty(rows, dtype=np.float32)
                self.ggml.ggml_backend_tensor_get(self.y, found.ctypes.data, 0, found.nbytes)
                close(name + layout, found[:CHECKED], dense @ self.x)

    def cycle(self, kind: int, buft: int, matrix: Any) -> Cycle | None:
        """A matrix in one layout, over and over; none where the layout is not for its type."""
        ggml, (rows, columns) = self.ggml, self.shape
        windows, count = spread(matrix.nbytes)
        context = self.context(windows * count)
        weights = [ggml.ggml_new_tensor_2d(context, kind, columns, rows) for _ in range(windows * count)]
        self.buffers.append(ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buft))
        context = self.context(windows * (count + 1) + 1, graphs=windows, nodes=count)
        x, (buffer, address) = self.activations(context)
        products = [ggml.ggml_mul_mat(context, of, x) for of in weights]
        if not ggml.ggml_backend_dev_supports_op(self.device, products[0]):
            return None
        for of in weights:
            ggml.ggml_backend_tensor_set(of, matrix.ctypes.data, 0, matrix.nbytes)
        for of in products:
            ggml.ggml_backend_tensor_alloc(buffer, of, address)
        self.y = products[0]
        starts = range(0, len(products), count)
        graphs = [self.graph(context, products[start : start + count]) for start in starts]
        return Cycle([lambda graph=graph: self.compute(graph) for graph in graphs], count, count * matrix.nbytes)

    def context(self, tensors: int, graphs: int = 0, nodes: int = 0) -> int:
        size = tensors * self.ggml.ggml_tensor_overhead()
        size += graphs * self.ggml.ggml_graph_overhead_custom(2 * nodes + 2, False) + 4096
        self.contexts.append(self.ggml.ggml_init(Parameters(size, None, True)))
        return self.contexts[-1]

    def activations(self, context: int) -> tuple[int, tuple[int, int]]:
        """The token, and the place (buffer, address) where all products of a cycle are written."""
        ggml, (rows, columns) = self.ggml, self.shape
        buffer = ggml.ggml_backend_buft_alloc_buffer(
            ggml.ggml_backend_dev_buffer_type(self.device), 4 * (rows + columns) + 4096
        )
        self.buffers.append(buffer)
        base = ggml.ggml_backend_buffer_get_base(buffer)
        x = ggml.ggml_new_tensor_2d(context, 0, columns, 1)
        ggml.ggml_backend_tensor_alloc(buffer, x, base)
        ggml.ggml_backend_tensor_set(x, self.x.ctypes.data, 0, self.x.nbytes)
        return x, (buffer, base + -(-self.x.nbytes // 64) * 64)

    def graph(self, context: int, products: list[int]) -> int:
        graph = self.ggml.ggml_new_graph_custom(context, 2 * len(products) + 2, False)
        for of in products:
            self.ggml.ggml_build_forward_expand(graph, of)
        return graph

    def compute(self, graph: int) -> None:
        if self.ggml.ggml_backend_graph_compute(self.backend, graph):
            raise SystemExit("ggml could not compute a graph")


class Process:
    """A side in a process of its own."""

    def __init__(self, side: type[Side], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, threads), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        self.pipe.send((method, arguments))
        try:
            return self.pipe.recv()
        except EOFError:
            sys.exit("a side ended early")


def serve(pipe: Connection, side: type[Side], threads: int) -> None:
    engine = side(threads)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(engine, method)(*arguments))


@contextmanager
def processes(threads: int) -> Iterator[list[Process]]:
    os.environ.update(OMP_NUM_THREADS=str(threads), RAYON_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS="1")
    both = [Process(Ours, threads), Process(Peer, threads)]
    yield both
    for of in both:
        of.pipe.close()
        of.process.join()


def measure(both: list[Process], bits: int, shape: tuple[int, int], rounds: int) -> None:
    """A line for each kernel of so many bits and its kin."""
    owners, sizes = {}, {}
    for of in both:
        found = of.ask("load", bits, *shape)
        owners.update(dict.fromkeys(found, of))
        sizes.update(found)
    turns: dict[str, list[tuple[float, bool]]] = {name: [] for name in owners}
    for _ in range(rounds):
        for name, of in owners.items():
            time.sleep(PAUSE)
            turns[name].append(of.ask("turn", name))
    report(bits, shape, sizes, turns)


def report(
    bits: int, shape: tuple[int, int], sizes: dict[str, tuple[int, int]], turns: dict[str, list[tuple[float, bool]]]
) -> None:
    own, weights = f"ours, {bits}-bit", shape[0] * shape[1]
    each = {name: [spent / sizes[name][0] for spent, _ in turns[name]] for name in turns}  # seconds of a product
    rates = {name: [sizes[name][1] / spent / 1e9 for spent, _ in turns[name]] for name in turns}
    for name in turns:
        if name == "read":
            continue
        products, nbytes = sizes[name]
        line = f"{shape[0]:>6}x{shape[1]:<5} {name:<20} {8 * nbytes / products / weights:>11.3f}"
        line += f" {1e6 * statistics.median(each[name]):>8.1f} {statistics.median(rates[name]):>6.2f}"
        line += f" {statistics.median(rates['read']):>6.2f} {quotient(rates[name], rates['read']):>7.2f}"
        line += f" {sum(quiet for _, quiet in turns[name]):>6}"
        if name != own:
            line += f" {quotient(rates[own], rates[name]):>13.2f} {quotient(each[name], each[own]):>11.2f}"
        print(line, flush=True)


def quotient(values: list[float], others: list[float]) -> float:
    """The median of the rounds' own ratios."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--bits", type=int, nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if find() is None:
        print(f"nothing to compare with: expected {PACKAGE} with its libraries, found none\nhint: {INSTALL}")
        return
    for threads in arguments.threads:
        with processes(threads) as both:
            print("", *(of.ask("about") for of in both), sep="\n")
            print(HEADER)
            for shape in SHAPES:
                for bits in arguments.bits:
                    measure(both, bits, shape, arguments.rounds)


if __name__ == "__main__":
    main()
