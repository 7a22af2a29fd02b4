"""The memory of a process over time, looked at from another one.

    python benches/serving/memory.py PROCESS EVERY

prints a line "seconds bytes" every so many seconds until the process is gone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from types import TracebackType

import psutil


class MemoryWatch:
    """A context manager: while it lasts, a child looks at this process; then `samples` are (seconds, bytes)."""

    def __init__(self, every: float = 0.1) -> None:
        self._every = every
        self.samples: list[tuple[float, int]] = []

    def __enter__(self) -> MemoryWatch:
        self._lines = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, str(psutil.Process().pid), str(self._every)]
        self._child = subprocess.Popen(command, stdout=self._lines)
        while not os.fstat(self._lines.fileno()).st_size:
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.terminate()
        self._child.wait()
        self._lines.seek(0)
        pairs = [line.split() for line in self._lines if line.endswith("\n")]
        self.samples = [(float(at), int(size)) for at, size in pairs]
        self._lines.close()

    def summary(self, points: int = 10) -> dict[str, object]:
        """MB at so many equal distances, the most, and MB a minute over all but the first fifth of the time."""
        end = self.samples[-1][0]
        chosen = [min(self.samples, key=lambda sample: abs(sample[0] - end * at / points))[1] for at in range(points)]
        late = [sample for sample in self.samples if sample[0] >= end / 5]
        return {
            "mb": [round(size / 1e6, 1) for size in [*chosen[1:], self.samples[-1][1]]],
            "most_mb": round(max(size for _, size in self.samples) / 1e6, 1),
            "mb_a_minute": round(_slope(late) * 60 / 1e6, 3),
        }


def _slope(samples: list[tuple[float, int]]) -> float:
    """Bytes a second, by least squares."""
    seconds = sum(at for at, _ in samples) / len(samples)
    size = sum(size for _, size in samples) / len(samples)
    spread = sum((at - seconds) ** 2 for at, _ in samples)
    return sum((at - seconds) * (value - size) for at, value in samples) / spread if spread else 0.0


def main() -> None:
    process, every = psutil.Process(int(sys.argv[1])), float(sys.argv[2])
    start = time.monotonic()
    while process.is_running():
        print(f"{time.monotonic() - start:.3f} {process.memory_info().rss}", flush=True)
        time.sleep(every)


if __name__ == "__main__":
    main()
