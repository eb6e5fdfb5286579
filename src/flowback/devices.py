"""Devices: the names that options and functions take, and what this machine has."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from typing import Any

import torch
from torch import Tensor

from flowback.errors import InputError, nearest

__all__ = ["cpu_cores", "describe", "pick_device", "send"]

_KINDS = ("cpu", "cuda", "mps", "xpu")
"""Kinds of device that training and sampling run on."""

_EXTRAS = {
    "datasets": "datasets",
    "fid": "torch-fidelity",
    "latent": "diffusers",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Package of each extra of this package."""


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
        raise InputError(f"{option} {name} is not available: this machine has {', '.join(_names())}.")
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


def describe() -> dict[str, Any]:
    """What flowback finds on this machine; `flowback info` shows it.

    Returns:
        ``devices``: name of each device, by what options call it; ``auto``: the one that they take by
        default; ``cpu_cores`` and ``threads``; ``cpu_vectors``: the processor's instructions, as PyTorch
        names them; ``bf16``: devices with matrix units for bfloat16; ``compiler``: what compiles the decode
        step, or None; ``extras``: optional packages, with their version, or None.
    """
    names = _names()
    return {
        "devices": {name: _title(name) for name in names},
        "auto": str(pick_device("auto")),
        "cpu_cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "cpu_vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16": [name for name in names if _has_bf16_units(name)],
        "compiler": next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None),
        "extras": {extra: _version(package) for extra, package in _EXTRAS.items()},
    }


def _title(name: str) -> str:
    """The maker's name of a device, and its memory where PyTorch tells."""
    if name == "cpu":
        return str(_cpu().get("cpu_name") or platform.machine())
    if name == "mps:0":
        return f"Apple, {platform.machine()}"
    module = torch.cuda if name.startswith("cuda") else torch.xpu
    properties = module.get_device_properties(name)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def _has_bf16_units(name: str) -> bool:
    """Whether a device multiplies matrices in bfloat16 faster than in fp32, as far as PyTorch tells."""
    if name == "cpu":
        return any(_cpu().get(unit) for unit in ("amx_bf16", "avx512_bf16", "bf16"))
    if name.startswith("cuda"):
        return torch.cuda.get_device_capability(name) >= (8, 0)
    return name.startswith("xpu")


def _cpu() -> dict[str, Any]:
    """What PyTorch knows of the processor; older versions know nothing."""
    return dict(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _count(kind: str) -> int:
    """How many devices of a kind this machine has."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "xpu":
        return torch.xpu.device_count() if torch.xpu.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return 1


def _names() -> list[str]:
    """All devices here."""
    return [kind if kind == "cpu" else f"{kind}:{i}" for kind in _KINDS for i in range(_count(kind))]
