"""The command that checks and measures on a GPU, tried without one: its benches run on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gpu import report
from gpu.bitdelta import BitDelta
from gpu.weights import random_site
from gpu_wheels import requirements

from meswitch import reference

HOUSE = Path(__file__).parents[1]
COMMAND = [sys.executable, HOUSE / "cuda" / "check" / "gpu_check.py"]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--wheels", folder / "none", "--output", folder / "out", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2
    assert "expected an NVIDIA GPU that torch can use, found none" in done.stderr and torch.__version__ in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--only", "tests,speed")
    assert done.returncode == 2 and "expected some of tests, kernels, engine, found speed" in done.stderr


def test_the_benches_run_anywhere(tmp_path: Path) -> None:
    """All of their code but what times a GPU; a broken part takes nothing from the others."""
    broken = tmp_path / "test_broken.py"
    broken.write_text("import pytest\n\n\n@pytest.mark.gpu\ndef test_broken():\n    assert False\n")
    options = ["--device", "cpu", "--kernels", "cpu", "--size", "tiny", "--limit", "600"]
    done = run(tmp_path, *options, "--tests", str(broken))
    lines = json.loads((tmp_path / "out" / "report.json").read_text())
    assert done.returncode == 1, done.stderr
    failed = [line for line in lines if "error" in line]
    assert {line["part"] for line in failed} == {"tests"}, failed
    found = {(line["part"], line["case"]): line["values"] for line in lines if "values" in line}
    assert found["environment", "found"]["torch"] == torch.__version__
    for bits in reference.BITS:
        assert found["kernels", f"{bits} bits, 16 rows of 16 experts, q, k, v"]["µs"] > 0
    assert found["kernels", "BitDelta's way, 1 row, down"]["with"] == "torch"
    assert found["engine", "16 experts, a request each"]["tokens/s"] > 0
    assert found["engine", "switching"]["request ms"] > 0
    assert "### engine" in (tmp_path / "out" / "report.md").read_text()


def test_a_part_that_hangs_is_stopped(tmp_path: Path) -> None:
    slow = tmp_path / "test_slow.py"
    slow.write_text("import time\n\nimport pytest\n\n\n@pytest.mark.gpu\ndef test_slow():\n    time.sleep(600)\n")
    done = run(tmp_path, "--device", "cpu", "--only", "tests", "--limit", "10", "--tests", str(slow))
    assert done.returncode == 1
    assert "stopped after 3 s, see tests.log" in (tmp_path / "out" / "report.md").read_text()


def test_what_is_found_is_written_at_once(tmp_path: Path) -> None:
    results = report.Results("kernels", tmp_path / "results.jsonl")
    results.note("fast", {"µs": 1.5, "with": "a | b"})
    results.run("broken", lambda: {"µs": 1 / 0})
    results.run("slow", lambda: {"µs": 9.0, "with": "c"})
    with results.path.open("a") as file:  # type: ignore[union-attr]
        file.write('{"part": "kern')  # killed while it wrote
    lines = report.read(tmp_path / "results.jsonl")
    assert [line["case"] for line in lines] == ["fast", "broken", "slow"] and results.failed == 1
    report.write(tmp_path, lines)
    assert json.loads((tmp_path / "report.json").read_text()) == lines
    assert (tmp_path / "report.md").read_text() == (
        "### kernels\n\n|  | µs | with |\n| --- | --- | --- |\n| fast | 1.5 | a \\| b |\n| slow | 9.0 | c |\n\n"
        "* **failed: broken**: ZeroDivisionError: division by zero\n"
    )


def test_random_sites_are_sites() -> None:
    """Any bytes are codes: levels lie around zero and every code occurs."""
    for bits in reference.BITS:
        site = random_site(70, 64, bits, seed=3)
        codes = (reference.dense(site) / site.parts[0].scales[0].float()[:, None] + site.parts[0].zero).round()
        assert codes.min() == 0 and codes.max() == 2**bits - 1


def test_bitdelta_is_a_product_of_signs() -> None:
    delta = BitDelta(3, 40, 64, "cpu")
    bits = torch.stack([delta.words >> place & 1 for place in range(32)], dim=2).reshape(3, 64, 40)
    x = torch.randn(3, 64).half()
    expected = torch.einsum("tc,tcr->tr", x.float(), bits.float() * 2 - 1) * 1e-4
    assert torch.allclose(delta(x).float(), expected, rtol=2e-2, atol=1e-5)


INTERPRETED = """
import torch
from gpu.bitdelta import BitDelta
delta = BitDelta(3, 72, 160, "cpu")
x = torch.randn(3, 160).half()
assert torch.allclose(delta.by_triton(x).float(), delta.by_torch(x).float(), rtol=2e-2, atol=1e-5)
"""


def test_bitdelta_in_triton_is_the_same_product() -> None:
    pytest.importorskip("triton")
    own = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(["benches", os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=HOUSE, env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_wheels_for_a_gpu_leave_out_what_is_there(tmp_path: Path) -> None:
    wheel = tmp_path / "meswitch-0.1.0-cp310-abi3-linux_x86_64.whl"
    required = ["torch>=2.6", "numpy", "rich", "transformers>=5.22,<6", 'ruff ; extra == "dev"']
    with zipfile.ZipFile(wheel, "w") as file:
        text = "".join(f"Requires-Dist: {line}\n" for line in required)
        file.writestr("meswitch-0.1.0.dist-info/METADATA", f"Metadata-Version: 2.4\nName: meswitch\n{text}\n")
    assert requirements(wheel) == ["rich", "transformers>=5.22,<6"]
