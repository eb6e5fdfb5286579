"""A row of settings with its published and measured results."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowback.config import RunConfig

__all__ = ["Preset"]


@dataclass(frozen=True)
class Preset:
    """A row: settings, where they come from, and what they gave."""

    config: RunConfig
    about: str
    published: dict[str, float] = field(default_factory=dict)
    """Numbers of the paper, by metric; `fid` on 4,096 samples, `fid_50k` on 50,000."""
    measured: dict[str, float] = field(default_factory=dict)
    """What this library measured; empty: none yet."""
