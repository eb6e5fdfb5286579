"""``flowback cache``: what is kept for later runs, and how to clear it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.errors import InputError, nearest
from flowback.files import cache_folder

__all__ = ["Options", "run"]


KEPT = ("features", "statistics", "native", "plans")
"""Encoder features of data sets, statistics of references, compiled decoders, plans of the flows that come
with flowback. Nothing else is touched: the folder is the user's to choose, and downloaded data sets lie
there, too."""


@dataclass(frozen=True)
class Options:
    """Show what flowback keeps for later runs, or clear it: all of it can be made anew.

    The folder is that in the environment variable FLOWBACK_CACHE, or ~/.cache/flowback.
    """

    clear: tuple[str, ...] = ()
    """Remove these parts; `all` removes all of them."""


def run(argv: list[str]) -> None:
    """Show, or clear and show the rest."""
    options = parse(Options, argv, "cache")
    try:
        folder = cache_folder()
    except OSError as error:
        raise InputError(f"There is no cache: {error}.") from None
    parts = _parts(folder)
    for name in options.clear:
        if name != "all" and name not in parts:
            raise InputError(f"--clear {name}: the cache has no such part; {nearest(name, [*parts, 'all'])}")
    for name in list(parts) if "all" in options.clear else dict.fromkeys(options.clear):
        shutil.rmtree(folder / name)
        count, size = parts.pop(name)
        say(f"Removed {name}: {count} files, {size / 1e6:.3g} MB")
    rows = [[name, count, size / 1e6] for name, (count, size) in parts.items()]
    if rows:
        show_table(
            str(folder), ["part", "files", "MB"], rows, note="flowback cache --clear PART removes one."
        )
    else:
        say(f"{folder} is empty.")


def _parts(folder: Path) -> dict[str, tuple[int, int]]:
    """Files and bytes of what is kept."""
    parts = {}
    for name in KEPT:
        if (folder / name).is_dir():
            files = [file for file in (folder / name).rglob("*") if file.is_file()]
            parts[name] = (len(files), sum(file.stat().st_size for file in files))
    return parts
