"""Times of work on a device, and what its memory can do, measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

FLUSHED = 512 << 20  # bytes written between two runs on a GPU: several times what its second cache holds
ROUNDS = 15


class Device:
    """`cuda:0`, or `cpu`, where the same code runs and the figures mean nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.is_gpu = name, name.startswith("cuda")
        self.captured = False
        """Whether the work that was timed last ran as a captured graph."""
        self._flush = torch.zeros(FLUSHED if self.is_gpu else 1, dtype=torch.uint8, device=name)
        self.gap = self.seconds(torch.zeros(1, device=name).zero_)
        """Seconds of one empty kernel, timed as everything is."""

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def memory(self) -> int:
        """Bytes of tensors on a GPU; 0 elsewhere."""
        return torch.cuda.memory_allocated() if self.is_gpu else 0

    @property
    def rounds(self) -> int:
        """How often work is timed."""
        return ROUNDS if self.is_gpu else 1

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of runs that begin with cold caches. On a GPU `work` is captured and replayed, if it can be."""
        run, self.captured = work, False
        for _ in range(2):  # kernels are loaded, memory is taken, and modules with one input have met
            work()
        if self.is_gpu:
            try:
                run, self.captured = self._capture(work), True
            except RuntimeError as error:
                print(f"not captured: {error}", flush=True)
        run()
        return statistics.median(self._once(run) for _ in range(self.rounds))

    def _capture(self, work: Callable[[], object]) -> Callable[[], object]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def _once(self, run: Callable[[], object]) -> float:
        self._flush.zero_()
        if not self.is_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def bandwidth(self) -> dict[str, float]:
        """Bytes a second of the device's memory: of a large copy, both ways counted, and of a large sum, read alone."""
        size = 2 << 30 if self.is_gpu else 1 << 22
        source = torch.ones(size // 4, device=self.name)
        target = torch.empty_like(source)
        copied = 2 * size / self.seconds(lambda: target.copy_(source))
        return {"copy": copied, "read": size / self.seconds(source.sum)}

    def copy_rate(self) -> float:
        """Bytes a second from pinned memory of the host."""
        size = 1 << 30 if self.is_gpu else 1 << 22
        source = torch.ones(size, dtype=torch.uint8, pin_memory=self.is_gpu)
        target = torch.empty(size, dtype=torch.uint8, device=self.name)
        times = []
        for _ in range(5):
            self.wait()
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            self.wait()
            times.append(time.perf_counter() - start)
        return size / statistics.median(times)
