"""Compares what kernels take of a multiprocessor with the table `cuda/resources.json`.

    python cuda/check/resources.py [--write]

Registers of a thread and bytes that did not fit into them, by device, as ptxas of the nvcc that is found says. Another
nvcc than the table's may differ. `--write` makes the table anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).parents[1]
TABLE = CUDA / "resources.json"
KERNELS = ("prepare", "multiply", "finish", "rows")
CAPABILITIES = ("80", "86", "90", "100", "120")
SAID = re.compile(
    r"Compiling entry function '(?P<name>\w+)'"
    r".*?(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

Resources = dict[str, dict[str, dict[str, int]]]


def find_nvcc() -> str:
    """A system's nvcc, or that of the wheel nvidia-cuda-nvcc in this environment or the active one."""
    prefixes = (sys.prefix, os.environ.get("VIRTUAL_ENV", sys.prefix))
    wheels = [
        path for prefix in prefixes for path in Path(prefix).glob("lib/python3*/site-packages/nvidia/cu13/bin/nvcc")
    ]
    found = shutil.which("nvcc") or next(map(str, wheels), None)
    if found is None:
        sys.exit(
            "expected nvcc on PATH or in the virtual environment, found none: pip install 'nvidia-cuda-nvcc==13.0.*' "
            "'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*'"
        )
    return found


def measure(nvcc: str) -> Resources:
    """By kernel and device."""
    table: Resources = {}
    jobs = [(kernel, capability) for kernel in KERNELS for capability in CAPABILITIES]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compile_one(job: tuple[str, str]) -> str:
            kernel, capability = job
            options = ["-cubin", "-std=c++17", "-Xptxas", "-v", f"-arch=sm_{capability}"]
            command = [nvcc, *options, CUDA / "kernels" / f"{kernel}.cu", "-o", f"{folder}/{kernel}.{capability}"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stderr

        for (_, capability), said in zip(jobs, pool.map(compile_one, jobs), strict=True):
            for match in SAID.finditer(said):
                found = {"registers": int(match["registers"]), "spilled_bytes": int(match["spilled"])}
                table.setdefault(match["name"], {})[f"sm_{capability}"] = found
    return table


def main() -> int:
    found = measure(find_nvcc())
    if sys.argv[1:] == ["--write"]:
        TABLE.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    expected: Resources = json.loads(TABLE.read_text(encoding="utf-8"))
    differ = 0
    for kernel in sorted(expected.keys() | found.keys()):
        for device in (f"sm_{capability}" for capability in CAPABILITIES):
            there, now = expected.get(kernel, {}).get(device), found.get(kernel, {}).get(device)
            if there != now:
                differ += 1
                print(f"{kernel} on {device}: expected {there}, found {now}")
    print(f"{len(found)} kernels on {len(CAPABILITIES)} devices: {differ} differences")
    return min(differ, 1)


if __name__ == "__main__":
    sys.exit(main())
