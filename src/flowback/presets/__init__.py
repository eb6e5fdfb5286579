"""Complete settings by name: small ones that run anywhere, and those of the papers with their numbers.

`NAME-mini` is the small sibling of a paper's row, on scikit-learn's digits.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

from flowback.errors import InputError, nearest
from flowback.presets.measured import MEASURED
from flowback.presets.papers import TABLES
from flowback.presets.preset import Preset
from flowback.presets.small import SMALL, mini

__all__ = ["PRESETS", "TABLES", "Preset", "get", "list_presets", "table"]


def _all() -> dict[str, Preset]:
    rows = {name: row for group in TABLES.values() for name, row in group.items()}
    # With one encoder in place of all, the encoders' rows would be copies of one run.
    small = {f"{name}-mini": mini(name, row) for name, row in rows.items() if name not in TABLES["encoders"]}
    every = {**SMALL, **rows, **small}
    return {name: replace(row, measured=MEASURED.get(name, {})) for name, row in every.items()}


PRESETS: dict[str, Preset] = _all()


def get(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        raise InputError(f"There is no preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def list_presets(pattern: str = "*") -> list[str]:
    """Names of the presets that match a pattern, where ``*`` stands for anything and ``?`` for one letter.

    Raises:
        InputError: none matches; the message names the nearest.

    Example:
        >>> import flowback
        >>> flowback.list_presets("digits*e")
        ['digits-reverse']
    """
    found = [name for name in PRESETS if fnmatchcase(name, pattern)]
    if not found:
        raise InputError(f"No preset matches {pattern!r}; {nearest(pattern.strip('*'), PRESETS)}")
    return found


def table(name: str, mini: bool = False) -> dict[str, Preset]:
    """The rows of a table, or their small siblings, by preset.

    Raises:
        InputError: there is no such table, or it has no small siblings.
    """
    if name not in TABLES:
        raise InputError(f"There is no table {name!r}; {nearest(name, TABLES)}")
    names = [f"{row}-mini" if mini else row for row in TABLES[name]]
    if names[0] not in PRESETS:
        raise InputError(f"The rows of {name} differ in their encoder alone and have no small siblings.")
    return {row: PRESETS[row] for row in names}
