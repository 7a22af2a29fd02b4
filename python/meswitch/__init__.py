"""Many full fine-tunes of one language model, from one machine.

    compress, distill, import_adapter    a fine-tune, or a LoRA adapter, as a delta directory
    quantize, evaluate_quantized         a whole model in a few bits a weight, and what that costs
    calibrate, measure_sensitivity       what a fine-tune sees, and what errors cost it
    Delta, restore, evaluate             look into a delta, turn it back, measure what it keeps
    train_router, evaluate_router        which expert a prompt should go to
    Engine                               serve the base and its experts in one batch

Every name is imported when it is first asked for, since torch and transformers take seconds; the errors are here at
once. Nothing here starts a thread or touches a device until it is called.
"""

from __future__ import annotations

from importlib import import_module

from meswitch.errors import (
    ArchitectureError,
    BackendError,
    BaseMismatchError,
    BudgetError,
    CheckpointError,
    ChecksumError,
    CudaUnavailableError,
    DataError,
    DataWarning,
    ExpertNameError,
    ExpertNotFoundError,
    FormatError,
    MeswitchError,
    NonFiniteError,
    OutputError,
    RequestError,
    RouterError,
    TransformersVersionError,
    UnsupportedModelError,
)

TYPE_CHECKING = False  # importing it from `typing` would take longer than the rest of this module
if TYPE_CHECKING:
    from typing import Any

    from meswitch.compression.calibration import Calibration, calibrate
    from meswitch.compression.distillation.job import distill
    from meswitch.compression.distillation.options import DistillOptions
    from meswitch.compression.evaluation import evaluate, evaluate_quantized
    from meswitch.compression.job import compress, quantize
    from meswitch.compression.lora import import_adapter
    from meswitch.compression.options import CompressOptions
    from meswitch.compression.sensitivity import measure_sensitivity
    from meswitch.compression.sharing.job import share
    from meswitch.delta.directory import Delta
    from meswitch.delta.restoration import restore
    from meswitch.engine.engine import Engine
    from meswitch.engine.request import Answer
    from meswitch.engine.stream import TextStream
    from meswitch.progress import Progress
    from meswitch.router.routers import evaluate_router, load_router, train_router

# Where each name that is imported late is at home.
_HOMES = {
    "Answer": "engine.request",
    "Calibration": "compression.calibration",
    "CompressOptions": "compression.options",
    "Delta": "delta.directory",
    "DistillOptions": "compression.distillation.options",
    "Engine": "engine.engine",
    "Progress": "progress",
    "TextStream": "engine.stream",
    "calibrate": "compression.calibration",
    "compress": "compression.job",
    "distill": "compression.distillation.job",
    "evaluate": "compression.evaluation",
    "evaluate_quantized": "compression.evaluation",
    "evaluate_router": "router.routers",
    "import_adapter": "compression.lora",
    "load_router": "router.routers",
    "measure_sensitivity": "compression.sensitivity",
    "quantize": "compression.job",
    "restore": "delta.restoration",
    "share": "compression.sharing.job",
    "train_router": "router.routers",
}

__all__ = [
    "Answer",
    "ArchitectureError",
    "BackendError",
    "BaseMismatchError",
    "BudgetError",
    "Calibration",
    "CheckpointError",
    "ChecksumError",
    "CompressOptions",
    "CudaUnavailableError",
    "DataError",
    "DataWarning",
    "Delta",
    "DistillOptions",
    "Engine",
    "ExpertNameError",
    "ExpertNotFoundError",
    "FormatError",
    "MeswitchError",
    "NonFiniteError",
    "OutputError",
    "Progress",
    "RequestError",
    "RouterError",
    "TextStream",
    "TransformersVersionError",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "compress",
    "distill",
    "evaluate",
    "evaluate_quantized",
    "evaluate_router",
    "import_adapter",
    "load_router",
    "measure_sensitivity",
    "quantize",
    "restore",
    "share",
    "train_router",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(f"meswitch.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'meswitch' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("meswitch")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "0.0.0"
