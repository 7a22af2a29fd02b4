"""Which backend runs a model."""

from __future__ import annotations

import logging

import torch

from meswitch import _native
from meswitch.errors import BackendError, CudaUnavailableError
from meswitch.kernels.cpu import CpuKernels
from meswitch.kernels.cuda import CudaKernels
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.torch import TorchKernels

_log = logging.getLogger(__name__)

BACKENDS = ("auto", "cpu", "cuda", "torch")


def usable_device(name: str) -> torch.device:
    """The device of this name. Raises `CudaUnavailableError` or `BackendError` where torch cannot use it.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # torch raises what it likes for a device that it was not built for
        hint = "`meswitch doctor` says what torch sees"
        if str(name).startswith("cuda"):
            _, driver, devices = _native.cuda_status()
            raise CudaUnavailableError(
                f"expected a device that torch can use, found {name!r}: {error}",
                hint=f"{hint}; the driver: {driver}, {len(devices)} devices",
            ) from error
        raise BackendError(f"expected a device that torch can use, found {name!r}: {error}", hint=hint) from error
    return device


def usable_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The floating-point dtype of this name; `None` for `None` and `"auto"`. Raises `BackendError` for another.

    >>> usable_dtype("bfloat16")
    torch.bfloat16
    """
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BackendError(
            f"dtype: expected the name of a floating-point dtype of torch, found {dtype!r}",
            hint="'bfloat16', 'float16', 'float32', or 'auto' for the checkpoint's own",
        )
    return found


def select_kernels(name: str, device: torch.device | str, *, exact: bool = False) -> Kernels:
    """The backend of this name for a model on `device`; `auto` is the quickest one there. Only `cpu` and `torch` can
    be `exact`.

    Raises `BackendError` for an unknown name, or one that cannot run on that device, and `CudaUnavailableError` for
    `cuda` where the build has no kernels.

    >>> select_kernels("auto", "cpu").name
    'cpu'
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise BackendError(f"kernels: expected one of {', '.join(BACKENDS)}, found {name!r}")
    if name in ("cpu", "cuda") and device.type != name:
        raise BackendError(
            f'kernels="{name}": expected device="{name}", found {device}', hint='kernels="torch" runs anywhere'
        )
    if name == "cuda" and exact:
        raise BackendError('exact: expected kernels="torch" on a GPU, found "cuda"', hint="leave kernels out")
    if name == "torch" or (device.type != "cpu" and (device.type != "cuda" or exact)):
        return TorchKernels(device)
    if device.type == "cpu":
        return CpuKernels(exact=exact)
    return _cuda_or_torch(device, name)


def _cuda_or_torch(device: torch.device, name: str) -> Kernels:
    """The kernels for NVIDIA GPUs, or without a name, where there are none, those that run anywhere."""
    try:
        return CudaKernels(device)
    except CudaUnavailableError as error:
        if name == "cuda":
            raise
        _log.warning("deltas are multiplied by plain torch, which is slow: %s", error)
        return TorchKernels(device)
