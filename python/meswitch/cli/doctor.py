"""`meswitch doctor`: what is installed here and what is used of it."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from meswitch import __version__
from meswitch.cli.arguments import Json
from meswitch.errors import MeswitchError
from meswitch.terminal.tables import print_json

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_MISSING = "not installed"


def doctor(as_json: Json = False) -> None:
    """Say what is installed here and what is used of it.

    Exit code 1 where something that meswitch needs is missing.

    \b
      meswitch doctor
    """
    report = _examine()
    if as_json:
        print_json(report)
    else:
        _print_report(report)
    if report["problems"]:
        raise typer.Exit(1)


def _print_report(report: dict[str, Any]) -> None:
    """A line an entry, those of a group under its name."""
    for name, value in report.items():
        for key, entry in value.items() if isinstance(value, dict) else [("", value)]:
            text = ", ".join(entry) if isinstance(entry, list) else str(entry)
            typer.echo(f"{f'{name} {key}'.strip():<22} {text or '-'}")


def _examine() -> dict[str, Any]:
    import platform

    versions = {name: _package_version(name) for name in _PACKAGES}
    native, native_problem = _examine_native()
    problems = [f"{name} is not installed" for name in _PACKAGES if versions[name] == _MISSING]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "version": {"meswitch": __version__, **versions},
        "cpu": {"count": os.cpu_count(), **native},
        "cuda": _examine_cuda(),
        "torch": _examine_torch(),
        "problems": problems + ([native_problem] if native_problem else []),
    }


def _examine_native() -> tuple[dict[str, Any], str | None]:
    """Instruction sets of the native module, and what keeps it from loading, if anything."""
    native: dict[str, Any] = {"backend": None, "backends": [], "features": []}
    try:
        from meswitch import _native

        features: dict[str, bool] = getattr(_native, "cpu_features", dict)()
        native["features"] = sorted(name for name, there in features.items() if there)
        native["backend"] = getattr(_native, "backend", lambda: None)()
        native["backends"] = getattr(_native, "backends", list)()
    except (ImportError, MeswitchError) as error:
        return native, f"meswitch._native does not load: {error}"
    return native, None


def _examine_cuda() -> dict[str, Any]:
    """The kernels of this build, the driver, and its GPUs, or why there are none."""
    try:
        from meswitch import _native
    except (ImportError, MeswitchError):
        return {}
    return dict(zip(("kernels", "driver", "devices"), _native.cuda_status(), strict=True))


def _examine_torch() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"error": str(error)}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"threads": torch.get_num_threads(), "cuda": torch.cuda.is_available(), "devices": devices}


def _package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return _MISSING
