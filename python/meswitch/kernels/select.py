"""Which backend runs a model."""

from __future__ import annotations

import torch

from meswitch.errors import BackendError
from meswitch.kernels.cpu import CpuKernels
from meswitch.kernels.protocol import Kernels
from meswitch.kernels.torch import TorchKernels

BACKENDS = ("auto", "cpu", "torch")


def select_kernels(name: str, device: torch.device | str, *, exact: bool = False) -> Kernels:
    """The backend of this name for a model on `device`; `auto` is the quickest one there.

    Raises `BackendError` for an unknown name, or one that cannot run on that device.

    >>> select_kernels("auto", "cpu").name
    'cpu'
    """
    device = torch.device(device)
    if name not in BACKENDS:
        raise BackendError(f"kernels: expected one of {', '.join(BACKENDS)}, found {name!r}")
    if name == "cpu" and device.type != "cpu":
        raise BackendError(
            f'kernels="cpu": expected device="cpu", found {device}', hint='kernels="torch" runs anywhere'
        )
    if name == "torch" or device.type != "cpu":
        return TorchKernels(device)
    return CpuKernels(exact=exact)
