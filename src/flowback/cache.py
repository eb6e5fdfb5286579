"""Where things that can be made again are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """The folder in the environment variable FLOWBACK_CACHE; by default ``~/.cache/flowback``."""
    return Path(os.environ.get("FLOWBACK_CACHE") or Path.home() / ".cache" / "flowback")
