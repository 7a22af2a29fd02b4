"""Gathers the wheels that `gpu_check.py` needs on a machine without a network: this project's and what it imports.

    python cuda/check/gpu_wheels.py dist/*.whl dist/gpu [--python 3.12]

torch and numpy, and what they require, are left to that machine, which is Linux on x86-64.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

OWN = ("torch", "numpy")
TESTS = ("pytest", "hypothesis")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17)] + ["manylinux2014_x86_64"]


def requirements(wheel: Path) -> list[str]:
    """What the wheel requires without an extra, but for what the other machine has."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        found = Parser().parsestr(file.read(name).decode()).get_all("Requires-Dist", [])
    return [text for text in found if "extra ==" not in text and re.split(r"[^\w.-]", text)[0] not in OWN]


def gather(wheel: Path, folder: Path, python: str) -> None:
    """Makes the folder anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(folder)]
    command += [*platforms, "--python-version", python, "--implementation", "cp"]
    subprocess.run([*command, *requirements(wheel), *TESTS], check=True)
    for name in OWN:
        for path in folder.glob(f"{name}-*.whl"):
            path.unlink()
    shutil.copy(wheel, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="the version of Python on the other machine")
    arguments = parser.parse_args()
    gather(arguments.wheel, arguments.folder, arguments.python)
    files = list(arguments.folder.glob("*.whl"))
    print(f"{arguments.folder}: {len(files)} wheels, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
