"""``flowback plot``: how runs went, as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flowback.cli.console import say
from flowback.cli.options import parse
from flowback.errors import InputError
from flowback.files import check_file

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Draw the figures of one run, or of several over each other; a run may still be going on."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path | None = None
    """The picture, .png, .svg or .pdf; by default curves.png in the first run's folder."""
    against: Literal["images", "seconds"] = "images"
    """What the figures are drawn over: images seen, or seconds of training."""


def run(argv: list[str]) -> None:
    """Read, draw."""
    options = parse(Options, argv, "plot")
    if not options.runs:
        raise InputError("flowback plot needs the folder of a run.")
    for folder in options.runs:
        if not (folder / "metrics.jsonl").is_file():
            raise InputError(f"{folder} is not the folder of a run: it has no metrics.jsonl.")
    out = options.out or options.runs[0] / "curves.png"
    check_file(out, "--out")
    from flowback.training.curves import plot_runs
    from flowback.training.run_folder import read_rows

    names = [folder.name for folder in options.runs]
    named = names if len(set(names)) == len(names) else list(map(str, options.runs))
    rows = {
        name: read_rows(folder / "metrics.jsonl") for name, folder in zip(named, options.runs, strict=True)
    }
    plot_runs(rows, out, options.against)
    say(f"Written: {out}")
