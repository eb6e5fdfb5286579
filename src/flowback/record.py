"""What it takes to repeat a figure, and files that are never half-written."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

__all__ = ["environment", "plain", "replacing", "write_json"]

_PACKAGES = (
    "flowback-nf",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scikit-learn",
    "accelerate",
    "torch-fidelity",
)


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions, commit, command, date and device, as written beside every figure."""
    device = torch.device(device)
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "device": f"{device.type}: {name}",
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the source tree that runs, with a mark if it was changed; None for an installed package."""
    try:
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (" (changed)" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a new file that takes the place of ``path`` when, and only when, it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # writing, unlike opening, does not know it
            error.filename = str(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_json(path: Path, data: Any) -> None:
    """Write :func:`plain` data atomically; what else JSON does not know is written as text."""
    with replacing(path) as file:
        json.dump(plain(data), file, indent=2, default=str, allow_nan=False)
        file.write("\n")


def plain(data: Any) -> Any:
    """Data that any reader of JSON takes: null for NaN and infinity, lists for arrays and tensors.

    Example:
        >>> plain({"nll": float("nan"), "z2": torch.ones(2)})
        {'nll': None, 'z2': [1.0, 1.0]}
    """
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [plain(value) for value in data]
    if isinstance(data, (torch.Tensor, np.ndarray, np.generic)):
        return plain(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
