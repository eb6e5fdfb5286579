"""Whether something counts as done: everything that decides its figures is what is asked for now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowback.checked import to_dict
from flowback.config import RunConfig
from flowback.files import plain
from flowback.reading import read_json
from flowback.task_config import EvaluateConfig, SampleConfig

__all__ = ["FORMAT", "deciding", "differences", "read"]

FORMAT = 1
"""Of the stored settings; another one differs."""

_APART = {"data": {"path", "download", "workers"}, "train": {"device", "timeout", "trackers"}}
"""Settings that decide no figure: images are known by their content, and the table tells the device."""


def deciding(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that decide its figures."""
    return {
        section: {name: value for name, value in values.items() if name not in _APART.get(section, set())}
        if isinstance(values, dict)
        else values
        for section, values in to_dict(config).items()
    }


def differences(stored: dict[str, Any], now: dict[str, Any], any_code: bool = False) -> list[str]:
    """What differs, each as `name was X, now Y`.

    A setting that the stored ones do not have yet stood at its default. ``any_code`` takes figures of other
    source code for the same.
    """
    before, after = _flat(plain(stored)), _flat(plain(now))
    defaults = _flat(
        {
            "config": deciding(RunConfig()),
            "sampling": to_dict(SampleConfig()),
            "options": to_dict(EvaluateConfig()),
        }
    )
    changes = []
    for name in sorted({*before, *after}):
        if any_code and name.split(".")[-1] == "code":
            continue
        default = next((value for end, value in defaults.items() if f".{name}".endswith(f".{end}")), None)
        if before.get(name, default) != after.get(name, default):
            changes.append(f"{name} was {before.get(name, default)}, now {after.get(name, default)}")
    return changes


def read(file: Path) -> dict[str, Any] | None:
    """A file of JSON; None where there is none, or it is damaged."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
