"""Runs the CUDA kernels on the host under AddressSanitizer and UBSan, and one launch under ThreadSanitizer.

    python cuda/check/sanitizers.py

The first two see what is read beyond a tensor, the third what one lane reads of another without a barrier. With g++.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HOUSE = Path(__file__).parents[2]
sys.path.append(str(HOUSE / "tests"))

import cuda_host  # noqa: E402

ADDRESS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
THREAD = ("-O1", "-g", "-fsanitize=thread", "-DHOST_THREADS", "-pthread")


def runtime(name: str) -> str:
    """The sanitizer's library, which must be loaded before Python."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def check_memory(folder: Path) -> None:
    """The ordinary tests. Leaks are Python's and torch's."""
    library = cuda_host.build(folder, flags=ADDRESS)
    environment = os.environ | {
        "CUDA_HOST_LIBRARY": str(library),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_cuda_kernels.py"]
    subprocess.run(command, cwd=HOUSE, env=environment, check=True)


def check_threads(folder: Path) -> None:
    """A small launch in which every lane is a thread."""
    sources = [cuda_host.CUDA / "kernels" / f"{name}.cu" for name in cuda_host.KERNELS]
    program = folder / "threads"
    command = ["g++", "-std=c++20", "-Wno-unknown-pragmas", *THREAD, "-x", "c++", *sources]
    subprocess.run([*command, cuda_host.CUDA / "check" / "threads.cpp", "-o", program], check=True)
    subprocess.run([program], env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}, check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        check_threads(Path(name))
        check_memory(Path(name))
