"""Devices: the names that options and functions take, and what this machine has."""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor

from flowback.errors import InputError, nearest

__all__ = ["cpu_cores", "pick_device", "send"]

_KINDS = ("cpu", "cuda", "mps", "xpu")
"""Kinds of device that training and sampling run on."""


def pick_device(name: str | torch.device = "auto", option: str = "Device") -> torch.device:
    """The device with that name.

    Args:
        name: ``cpu``, ``cuda``, ``mps`` or ``xpu``, with an index (``cuda:1``) where there are several;
            ``auto`` is the first of CUDA, XPU and MPS that is available, else the CPU.
        option: its name in error messages; the command line says ``--device``.

    Raises:
        InputError: the device is unknown, or this machine does not have it.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    name = str(name)
    if name == "auto":
        return torch.device(next((kind for kind in ("cuda", "xpu", "mps") if _count(kind)), "cpu"))
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", name)
    if match is None or match[1] not in _KINDS:
        hint = nearest(name.split(":")[0].lower(), ("auto", *_KINDS))
        raise InputError(f"{option} {name} is unknown; {hint}")
    kind, index = match[1], int(match[2] or 0)
    if index >= _count(kind):
        raise InputError(f"{option} {name} is not available: this machine has {_present()}.")
    return torch.device(name)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; for CUDA through pinned memory, so that nobody waits for the copy.

    From memory that is not pinned, a copy either waits all the same (CUDA) or may read what is there later
    (MPS).
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def cpu_cores() -> int:
    """Cores that this process may use, if the system tells (Linux); else those of the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count(kind: str) -> int:
    """How many devices of a kind this machine has."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return 1


def _present() -> str:
    """The names of all devices here, in words."""
    names = [kind if kind == "cpu" else f"{kind}:{i}" for kind in _KINDS for i in range(_count(kind))]
    return ", ".join(names)
