"""Breaks the CUDA kernels on purpose, one line at a time, and expects their tests to fail.

    python cuda/check/mutations.py [WORDS OF A NAME]

A break that no test notices ends this with exit code 1: either a test is missing or the line is not needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOUSE = Path(__file__).parents[2]
sys.path.append(str(HOUSE / "tests"))

import cuda_host  # noqa: E402

# Name: file, what stands there, what stands there instead.
MUTATIONS = {
    "waits for one copy too few": ("kernels/multiply.cu", "copies_wait<STAGES - 2>", "copies_wait<STAGES - 1>"),
    "no barrier after the wait": (
        "kernels/multiply.cu",
        "copies_wait<STAGES - 2>();\n        __syncwarp();",
        "copies_wait<STAGES - 2>();",
    ),
    "a chunk is brought over the one that is read": (
        "kernels/multiply.cu",
        "stage ? stage - 1 : STAGES - 1",
        "stage",
    ),
    "wrong swizzle": ("kernels/multiply.cu", "16 * (piece ^ (first / 2 & 3))", "16 * piece"),
    "wrong bytes picked": ("kernels/multiply.cu", "raw[0], raw[1], 0x7531", "raw[0], raw[1], 0x7530"),
    "no barrier before warps are added": (
        "kernels/multiply.cu",
        "__syncthreads();\n    int token",
        "int token",
    ),
    "no barrier after warps are added": (
        "kernels/multiply.cu",
        "__syncthreads();  // the next item",
        "// the next item",
    ),
    "zero of the low byte forgotten": ("kernels/multiply.cu", " - twice.x * sums.x[1]", ""),
    "high bits of three as low ones": ("kernels/multiply.cu", "{8, 0}", "{2, 0}"),
    "scale of another row": ("kernels/multiply.cu", "first + odd;", "first + (odd ^ 1);"),
    "row list ignored": ("kernels/multiply.cu", "part.rows ? part.rows[row] : row", "row"),
    "columns of the next group included": ("kernels/multiply.cu", "column >= low && column < high", "column >= low"),
    "step of the first slice for all": (
        "kernels/multiply.cu",
        "unit.steps(width, first / SLICE)",
        "unit.steps(width, 0)",
    ),
    "slices not told apart": ("kernels/multiply.cu", " || column % SLICE == 0", ""),
    "no barrier after the largest value": (
        "kernels/prepare.cu",
        "= most;\n    __syncthreads();",
        "= most;",
    ),
    "no barrier between slices": ("kernels/prepare.cu", "__syncthreads();  // `most`", "// `most`"),
    "column scales forgotten": ("kernels/prepare.cu", "values[i] *= half_to_float(scales[first + i]);", "{}"),
    "high byte not rounded": ("kernels/prepare.cu", "(value + 128) >> 8", "value >> 8"),
    "partial sums left behind": ("kernels/finish.cu", "*partial = 0.f;", ""),
    "first share of the columns only": ("kernels/finish.cu", "split < unit.launch.splits", "split < 1"),
    "columns of sparse entries begin anew": ("kernels/finish.cu", "before + warp_running_sum(", "warp_running_sum("),
    "no barrier before sparse sums are read": (
        "kernels/finish.cu",
        "__syncthreads();\n        int token",
        "int token",
    ),
    "no barrier after sparse sums are read": ("kernels/finish.cu", "__syncthreads();  // `sparse`", "// `sparse`"),
    "exponent forgotten": ("kernels/finish.cu", "unit.slot.unit * delta_of", "delta_of"),
    "row beyond the last taken": ("kernels/rows.cu", "row >= 0 && row < launch.rows", "row >= 0"),
    "row list of a part searched wrongly": ("kernels/rows.cu", "part.rows[low] == row ? low : -1", "true ? low : -1"),
    "columns of rows begin at the item": (
        "kernels/rows.cu",
        "first_column + warp * OWN_COLUMNS;\n    float",
        "first_column;\n    float",
    ),
    "high bit of three bits forgotten": ("kernels/rows.cu", " + 4 * code_at(high, pitch, 1, column)", ""),
    "scale of the first group for all": ("kernels/rows.cu", "int group = column / part.group_size;", "int group = 0;"),
    "low rank of the row's place": ("kernels/rows.cu", "low_rank_at(*slot, memory.rows[at]", "low_rank_at(*slot, at"),
    "no barrier before rows are written": (
        "kernels/rows.cu",
        "add_single(sums, *slot, row, first, end);\n    }\n    __syncthreads();",
        "add_single(sums, *slot, row, first, end);\n    }",
    ),
    "no barrier after rows are written": ("kernels/rows.cu", "__syncthreads();  // `sums`", "// `sums`"),
    "slot beyond the table taken": ("include/delta.cuh", "slot >= 0 && slot < slot_count ?", "slot >= 0 ?"),
    "units summed before they are counted": (
        "include/delta.cuh",
        "count(Unit(launch, unit));\n        __syncthreads();",
        "count(Unit(launch, unit));",
    ),
    "sums of units begin anew": ("include/delta.cuh", "int sum = before + warp", "int sum = warp"),
}


def is_noticed(folder: Path, file: str, old: str, new: str) -> bool:
    """Whether the tests fail with this change."""
    source = folder / "cuda"
    shutil.copytree(cuda_host.CUDA, source)
    text = (source / file).read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file}: expected one {old!r}, found {text.count(old)}"
    (source / file).write_text(text.replace(old, new), encoding="utf-8")
    library = cuda_host.build(folder, source, ("-O1", "-w"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_cuda_kernels.py"]
    environment = os.environ | {"CUDA_HOST_LIBRARY": str(library)}
    return subprocess.run(command, cwd=HOUSE, env=environment, capture_output=True).returncode != 0


def main(words: str) -> int:
    missed = 0
    for name, mutation in MUTATIONS.items():
        if words not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            noticed = is_noticed(Path(folder), *mutation)
        missed += not noticed
        print(f"{name:<50} {'noticed' if noticed else 'MISSED'} {time.monotonic() - start:5.0f} s", flush=True)
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
