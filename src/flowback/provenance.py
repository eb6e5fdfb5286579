"""What is needed to repeat a result: versions, commit, command, date and device."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

__all__ = ["code_hash", "environment"]

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


@functools.cache
def code_hash() -> str:
    """Hash of all source files of flowback: unlike the commit, an installed package has it too.

    Example:
        >>> len(code_hash())
        16
    """
    digest = hashlib.blake2b(digest_size=8)
    package = Path(__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the running source tree, marked if it was changed; None for an installed package."""
    try:
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (" (changed)" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
