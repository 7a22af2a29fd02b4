"""Installs the wheel of a folder into an empty virtual environment and uses it there, as a stranger would.

    python tests/wheel.py dist

Nothing of the repository is on the environment's path: the commands run in a temporary folder. The models are random
and tiny; they are made by this file, run again by the environment's own Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

PROMPT = "It was a bright cold day in April"


def save_models(folder: Path) -> None:
    """A base and a fine-tune of it in `base` and `finetune`; `meswitch` must come from the environment."""
    import meswitch
    from families import config_of, save_finetune, save_random

    assert Path(sys.prefix) in Path(meswitch.__file__).parents, f"imported {meswitch.__file__}, not the wheel"
    save_random(folder / "base", config_of("llama"))
    save_finetune(folder / "finetune", folder / "base", seed=1)


def check(dist: Path) -> None:
    """Raises where the one wheel in `dist` does not install or a command of it fails."""
    (wheel,) = dist.resolve().glob("*.whl")
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    outside["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="meswitch-wheel-") as name:
        folder = Path(name).resolve()
        scripts = folder / "venv" / "bin"

        def run(*command: object) -> None:
            print("$", Path(str(command[0])).name, *command[1:], flush=True)
            start = time.monotonic()
            subprocess.run([str(part) for part in command], cwd=folder, env=outside, check=True)
            print(f"  {time.monotonic() - start:.1f} s", flush=True)

        venv.create(folder / "venv", with_pip=True)
        python, meswitch = scripts / "python", scripts / "meswitch"
        run(python, "-m", "pip", "install", "--quiet", wheel)
        run(meswitch, "--version")
        run(meswitch, "doctor")
        run(python, Path(__file__).resolve(), "--save-models", folder)
        run(meswitch, "compress", "base", "finetune", "-o", "experts/tuned")
        run(meswitch, "verify", "experts/tuned", "--base", "base")
        run(meswitch, "generate", "base", PROMPT, "--experts", "experts", "--expert", "tuned", "--max-new-tokens", 8)
    print(f"{wheel.name} installs and works")


if __name__ == "__main__":
    if sys.argv[1] == "--save-models":
        save_models(Path(sys.argv[2]))
    else:
        check(Path(sys.argv[1]))
