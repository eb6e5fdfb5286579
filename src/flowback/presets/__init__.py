"""Complete settings by name: small ones that run anywhere, and those of the papers with their numbers.

`NAME-mini` is the small sibling of a paper's row, on scikit-learn's digits; `fashion*` are rows on
Fashion-MNIST. :data:`TABLES` holds the paper's tables and figures, whose rows are presets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from flowback.config import RunConfig
from flowback.errors import InputError, nearest
from flowback.presets.published import MEASURED, TABLES, PaperTable, published
from flowback.presets.settings import SETTINGS

__all__ = ["PRESETS", "TABLES", "PaperTable", "Preset", "get_preset", "list_presets"]


@dataclass(frozen=True)
class Preset:
    """A row: settings, where they come from, and what they gave."""

    config: RunConfig
    about: str
    published: dict[str, float] = field(default_factory=dict)
    """Numbers of the paper, by metric; `fid` on 4,096 samples, `fid_50k` on 50,000."""
    measured: dict[str, float] = field(default_factory=dict)
    """What this library measured; empty: none yet."""


PRESETS: dict[str, Preset] = {
    name: Preset(config, about, published(name), MEASURED.get(name, {}))
    for name, (about, config) in SETTINGS.items()
}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: there is none; the message names the nearest.

    Example:
        >>> get_preset("digits").config.model.image_size
        8
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
        ['digits-reverse', 'digits-range']
    """
    names = [name for name in PRESETS if fnmatchcase(name, pattern)]
    if not names:
        raise InputError(f"No preset matches {pattern!r}; {nearest(pattern.strip('*'), PRESETS)}")
    return names
