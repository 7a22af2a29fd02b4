"""Checks and measures everything on a machine with an NVIDIA GPU and torch; no Rust, no nvcc and no network there.

    make gpu-wheel        on a machine with a network; dist/gpu and this tree then go along
    python3 cuda/check/gpu_check.py [--only tests,kernels,engine] [--output DIR] [--limit 480]

The wheels of `--wheels` (default: dist/gpu, where it exists) are unpacked into a temporary folder that Python looks
into first; torch and numpy are the machine's own. Then each part runs in a process of its own, for a share of the
seconds of `--limit`:

    environment    which GPU, driver, torch and kernels
    tests          every kernel against the reference: pytest -m gpu
    kernels        benches/gpu/kernels.py
    engine         benches/gpu/engine.py

`results.jsonl` in the output folder ($OUT, or gpu-report) gets a line as soon as something is known, `report.md` and
`report.json` are written after every part, and a part that fails or is stopped takes nothing from the others. Exit
code 1: something failed; 2: there is no GPU. `--device cpu --kernels torch --size tiny` tries the benches anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOUSE = Path(__file__).resolve().parents[2]
sys.path.append(str(HOUSE / "benches"))

from gpu import report  # noqa: E402

SHARES = {"tests": 0.35, "kernels": 0.35, "engine": 1.0}
"""Of the time that is left when a part begins."""
TEST_LINE = re.compile(r"^(?P<name>\S+::.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL)", re.MULTILINE)
ENVIRONMENT = """
import json, platform, torch
from meswitch import __version__, _native
gpu = torch.cuda.is_available()
kernels, driver, devices = _native.cuda_status()
found = {"python": platform.python_version(), "torch": torch.__version__, "meswitch": __version__}
found |= {"gpu": torch.cuda.get_device_name() if gpu else "none that torch can use", "driver": driver}
print(json.dumps(found | {"kernels": kernels}))
"""


@dataclass
class Check:
    """One run. `environment`: of every part's process. `end`: when all must be over, by the monotonic clock."""

    arguments: argparse.Namespace
    environment: dict[str, str]
    end: float

    @property
    def results(self) -> Path:
        path: Path = self.arguments.output / "results.jsonl"
        return path

    def command(self, part: str) -> list[str]:
        if part == "tests":
            options = ["-m", "gpu", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
            return [sys.executable, "-m", "pytest", *options, *self.arguments.tests]
        own = self.arguments
        options = ["--device", own.device, "--kernels", own.kernels, "--size", own.size]
        return [sys.executable, "-m", f"gpu.{part}", *options, "--results", str(self.results)]

    def run(self, part: str) -> bool:
        """Runs a part to its end, or stops it; whether all of it is well. Its output goes into a file of its own."""
        seconds = SHARES[part] * (self.end - time.monotonic())
        if seconds < 1:
            return self.fail(part, "no time was left for it")
        log, start = self.arguments.output / f"{part}.log", time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(part),
                cwd=HOUSE,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        text = log.read_text(encoding="utf-8", errors="replace")
        if part == "tests":
            self.note_tests(text, time.monotonic() - start)
        if code is None:
            return self.fail(part, f"stopped after {seconds:.0f} s, see {log.name}")
        if code != 0 and not any(line["part"] == part and "error" in line for line in report.read(self.results)):
            return self.fail(part, f"exit code {code}: {text.strip()[-300:]}")
        return code == 0

    def note_tests(self, text: str, seconds: float) -> None:
        outcomes = {match["name"]: match["outcome"] for match in TEST_LINE.finditer(text)}
        counts = {
            kind.lower(): list(outcomes.values()).count(kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")
        }
        results = report.Results("tests", self.results)
        results.note("pytest -m gpu", counts | {"s": round(seconds, 1)})
        for name, outcome in outcomes.items():
            if outcome in ("FAILED", "ERROR"):
                results.fail(name, f"{outcome.lower()}, see tests.log")

    def fail(self, part: str, why: str) -> bool:
        report.Results(part, self.results).fail("the whole part", why)
        return False


def unpack(wheels: Path, folder: Path) -> None:
    """What pip would install of them, but for commands; needs neither pip nor a network."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder)


def process_environment(site: Path | None) -> dict[str, str]:
    folders = [*filter(None, [site and str(site)]), str(HOUSE / "benches"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    # Plugins of the machine's own pytest may not go with the one that was brought along.
    return {**os.environ, **own, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def examine(environment: dict[str, str]) -> dict[str, Any]:
    """What there is. Ends the program where meswitch or torch cannot be imported."""
    done = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT], cwd=HOUSE, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        sys.exit(
            "gpu-check: meswitch and torch cannot be imported by this Python: bring dist/gpu along (make gpu-wheel)"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(arguments: argparse.Namespace, site: Path | None) -> int:
    environment = process_environment(site)
    found = examine(environment)
    if arguments.device.startswith("cuda") and found["gpu"].startswith("none"):
        print(
            f"gpu-check: expected an NVIDIA GPU that torch can use, found none: torch {found['torch']}, driver: "
            f"{found['driver']}",
            file=sys.stderr,
        )
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    run = Check(arguments, environment, time.monotonic() + arguments.limit)
    run.results.unlink(missing_ok=True)
    report.Results("environment", run.results).note("found", found)
    well = True
    for part in arguments.only:
        well &= run.run(part)
        report.write(arguments.output, report.read(run.results))
    print(report.markdown(report.read(run.results)))
    return 0 if well else 1


def parts_of(text: str) -> list[str]:
    parts = text.split(",")
    if unknown := set(parts) - SHARES.keys():
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(SHARES)}, found {', '.join(sorted(unknown))}")
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=HOUSE / "dist" / "gpu")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu-report")))
    parser.add_argument("--only", type=parts_of, default=list(SHARES))
    parser.add_argument("--limit", type=float, default=480, help="seconds for all parts together")
    parser.add_argument("--tests", nargs="*", default=["tests/test_cuda_gpu.py"])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--kernels", default="cuda")
    parser.add_argument("--size", default="mistral-7b")
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    if not arguments.wheels.is_dir():
        return check(arguments, None)
    with tempfile.TemporaryDirectory(prefix="meswitch-gpu-") as folder:
        unpack(arguments.wheels, Path(folder))
        return check(arguments, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
