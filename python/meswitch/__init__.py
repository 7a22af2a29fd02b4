"""Many full fine-tunes of one language model, from one machine."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from meswitch.errors import MeswitchError

if TYPE_CHECKING:
    from meswitch.calibration import Calibration as Calibration
    from meswitch.calibration import calibrate as calibrate
    from meswitch.delta import Delta as Delta
    from meswitch.engine import Answer as Answer
    from meswitch.engine import Engine as Engine

try:
    __version__ = version("meswitch")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"

# Imported when first asked for: torch and transformers take seconds. A function that is named as its module is not
# here, since the module would take its place: `from meswitch.compress import compress`.
_HOMES = {
    "Answer": "engine",
    "Calibration": "calibration",
    "Delta": "delta",
    "Engine": "engine",
    "calibrate": "calibration",
}

__all__ = ["MeswitchError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'meswitch' has no attribute {name!r}")
    return getattr(import_module(f"meswitch.{_HOMES[name]}"), name)
