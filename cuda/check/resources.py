"""Compares what nvcc makes of the kernels with the table `cuda/resources.json`.

    python cuda/check/resources.py [--write]

By kernel and device: registers of a thread and bytes that did not fit into them, as ptxas says; and from the machine
code, where nvdisasm is found, the instructions that speed rests on and the spills within loops. Another nvcc than the
table's may differ and is not compared. `--write` makes the table anew. Exit code 1: there are differences; 2: nothing
was compared.
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
from typing import Any

import machine_code

CUDA = Path(__file__).parents[1]
TABLE = CUDA / "resources.json"
KERNELS = ("prepare", "multiply", "finish", "rows")
CAPABILITIES = ("80", "86", "90", "100", "120")
SAID = re.compile(
    r"Compiling entry function '(?P<name>\w+)'"
    r".*?(?P<spilled_bytes>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
PTXAS_SAYS = ("registers", "spilled bytes")

Resources = dict[str, dict[str, dict[str, int]]]
"""By kernel, device and what is counted; what is not there is not counted, or 0."""


class NotComparedError(Exception):
    """There is no compiler, or not the table's."""


def find_nvcc() -> Path:
    """A system's nvcc, or that of the wheels that `make` puts into a folder of the virtual environment."""
    found = [Path(path) for path in [shutil.which("nvcc")] if path is not None]
    prefixes = [sys.prefix, *filter(None, [os.environ.get("VIRTUAL_ENV")])]
    found += [path for prefix in prefixes if (path := Path(prefix) / "cuda/nvidia/cu13/bin/nvcc").is_file()]
    if not found:
        raise NotComparedError("no nvcc on PATH or in the virtual environment, where `make venv` puts it")
    return found[0]


def release(nvcc: Path) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return said.split("release ")[1].split(",")[0]


def measure(nvcc: Path) -> Resources:
    """What this nvcc makes of every kernel for every device."""
    table: Resources = {}
    nvdisasm = machine_code.find_nvdisasm()
    jobs = [(kernel, capability) for kernel in KERNELS for capability in CAPABILITIES]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def examine(job: tuple[str, str]) -> dict[str, dict[str, int]]:
            kernel, capability = job
            cubin = Path(folder) / f"{kernel}.{capability}"
            options = ["-cubin", "-std=c++17", "-Xptxas", "-v", f"-arch=sm_{capability}"]
            command = [nvcc, *options, CUDA / "kernels" / f"{kernel}.cu", "-o", cubin]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            found = {
                match["name"]: {kind: int(match[kind.replace(" ", "_")]) for kind in PTXAS_SAYS}
                for match in SAID.finditer(said)
            }
            if nvdisasm is not None:
                for name, blocks in machine_code.functions(machine_code.disassemble(nvdisasm, cubin)).items():
                    found[name] |= {kind: count for kind, count in machine_code.summarize(blocks).items() if count}
            return found

        for (_, capability), found in zip(jobs, pool.map(examine, jobs), strict=True):
            for name, counts in found.items():
                table.setdefault(name, {})[f"sm_{capability}"] = counts
    return table


def differences() -> list[str]:
    """A line for every number that is not the table's. Raises `NotComparedError`."""
    nvcc, table = find_nvcc(), json.loads(TABLE.read_text(encoding="utf-8"))
    if release(nvcc) != table["nvcc"]:
        raise NotComparedError(f"the table is of nvcc {table['nvcc']}, found {release(nvcc)}")
    expected: Resources = table["kernels"]
    found, lines = measure(nvcc), []
    for kernel in sorted(expected.keys() | found.keys()):
        for device in (f"sm_{capability}" for capability in CAPABILITIES):
            there, now = expected.get(kernel, {}).get(device, {}), found.get(kernel, {}).get(device, {})
            kinds = PTXAS_SAYS if machine_code.find_nvdisasm() is None else sorted(there.keys() | now.keys())
            for kind in kinds:
                if there.get(kind, 0) != now.get(kind, 0):
                    lines.append(
                        f"{kernel} on {device}: {kind}: expected {there.get(kind, 0)}, found {now.get(kind, 0)}"
                    )
    return lines


def write() -> None:
    if machine_code.find_nvdisasm() is None:
        raise NotComparedError("no nvdisasm on PATH or in the wheel of Triton")
    nvcc = find_nvcc()
    table: dict[str, Any] = {"nvcc": release(nvcc), "kernels": measure(nvcc)}
    TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    try:
        if sys.argv[1:] == ["--write"]:
            write()
            return 0
        lines = differences()
    except NotComparedError as error:
        print(f"not compared: {error}")
        return 2
    print("\n".join([*lines, f"{len(lines)} differences from {TABLE.name}"]))
    return min(len(lines), 1)


if __name__ == "__main__":
    sys.exit(main())
