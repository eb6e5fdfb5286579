"""One record for each evaluation: the figures, and everything that it takes to get them again.

kind      classify, evaluate or probe
figures   names to numbers
settings  all that decides them: data, protocol, counts, seeds, guidance, hashes of weights and reference
warnings  sentences that belong beside the figures
environment  versions, commit, command, date, device
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowback import checkpoint
from flowback.errors import InputError
from flowback.provenance import environment

__all__ = ["Comparison", "compare", "make_record", "read_record", "weights_of"]


def weights_of(path: Path) -> dict[str, str]:
    """The checkpoint that ``path`` means and the SHA-256 of its weights."""
    folder = checkpoint.resolve(path)
    with (folder / "model.safetensors").open("rb") as file:
        return {"checkpoint": str(folder), "weights_sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def make_record(
    kind: str,
    figures: dict[str, Any],
    settings: dict[str, Any],
    warnings: list[str],
    device: torch.device | str,
) -> dict[str, Any]:
    """The record, ready to be written as JSON."""
    return {
        "kind": kind,
        "figures": figures,
        "settings": settings,
        "warnings": warnings,
        "environment": environment(device),
    }


def read_record(path: Path) -> dict[str, Any]:
    """A record that was written as JSON.

    Raises:
        InputError: no such file, or no record.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise InputError(
            f"{path} is not JSON; give a record of flowback evaluate, classify or probe."
        ) from None
    parts = ("figures", "settings", "environment")
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in parts):
        raise InputError(f"{path} is no record of flowback evaluate, classify or probe.")
    return record


class Comparison(NamedTuple):
    """Two records side by side."""

    figures: list[tuple[str, Any, Any]]
    """Every figure that is a number in either record."""
    settings: list[tuple[str, Any, Any]]
    """What decides the figures and is not the same."""
    environment: list[tuple[str, Any, Any]]
    """Versions, commit and device, where not the same."""


_APART = ("command", "date")
"""Parts of the environment that differ between any two runs."""


def compare(a: dict[str, Any], b: dict[str, Any]) -> Comparison:
    """Figures of both records, and the settings and environment in which they differ."""
    figures = [
        row
        for row in _paired(a["figures"], b["figures"])
        if any(isinstance(value, (int, float)) and not isinstance(value, bool) for value in row[1:])
    ]
    settings = _paired({"kind": a.get("kind"), **a["settings"]}, {"kind": b.get("kind"), **b["settings"]})
    around = [row for row in _paired(a["environment"], b["environment"]) if row[0] not in _APART]
    return Comparison(figures, *([row for row in rows if row[1] != row[2]] for rows in (settings, around)))


def _paired(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Values of both under their dotted names, in the order of the first."""
    left, right = _flat(a), _flat(b)
    return [(name, left.get(name), right.get(name)) for name in {**left, **right}]


def _flat(data: Any, name: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        items = [(str(index), value) for index, value in enumerate(data, start=1)]
    else:
        return {name: data}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _flat(value, f"{name}.{key}" if name else key)
    return found
