"""`meswitch doctor`: what is installed here and what is used of it."""

from __future__ import annotations

import os
from typing import Any

import typer

from meswitch import __version__
from meswitch.cli.app import Json, app
from meswitch.errors import MeswitchError
from meswitch.terminal.tables import print_json


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed here and what is used of it.

    Exit code 1 where something that meswitch needs is missing.

    \b
      meswitch doctor
    """
    found = _examine()
    if as_json:
        print_json(found)
    else:
        for name, value in found.items():
            for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
                text = ", ".join(entry) if isinstance(entry, list) else str(entry)
                typer.echo(f"{f'{name} {key}'.strip():<22} {text or '-'}")
    if found["problems"]:
        raise typer.Exit(1)


def _examine() -> dict[str, Any]:
    import platform

    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    versions = {name: _version(name) for name in packages}
    problems = [f"{name} is not installed" for name in packages if versions[name] == "not installed"]
    native: dict[str, Any] = {"backend": None, "backends": [], "features": []}
    try:
        from meswitch import _native

        features: dict[str, bool] = getattr(_native, "cpu_features", dict)()
        native["features"] = sorted(name for name, there in features.items() if there)
        native["backend"] = getattr(_native, "backend", lambda: None)()
        native["backends"] = getattr(_native, "backends", list)()
    except (ImportError, MeswitchError) as error:
        problems.append(f"meswitch._native does not load: {error}")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "version": {"meswitch": __version__, **versions},
        "cpu": {"count": os.cpu_count(), **native},
        "torch": _torch(),
        "problems": problems,
    }


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"error": str(error)}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "devices": devices}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
