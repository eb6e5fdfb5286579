"""``flowback reproduce``: train and evaluate the rows of a table one after the other, and fill it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowback.cli.console import say, show_table
from flowback.cli.options import SEARCH, parse
from flowback.errors import InputError
from flowback.task_config import ReproduceConfig, SampleConfig, Scale

if TYPE_CHECKING:
    from flowback.tables import Table

__all__ = ["Drawing", "Filling", "Options", "run"]


@dataclass(frozen=True)
class Filling(ReproduceConfig):
    """How the table is filled in, with the search as it is typed."""

    search: Annotated[tuple[float, ...], SEARCH] = ()
    """Guidance scales to try instead of one; the table shows the figures of the best."""


@dataclass(frozen=True)
class Drawing(SampleConfig):
    """How samples are drawn, except for the guidance, which may depend on the table."""

    guidance: tyro.conf.Suppress[float] = 0.0


@dataclass(frozen=True)
class Options:
    """Reproduce a table of the paper, row by row. Run the same command again to continue.

    Runs are in OUT/runs, full records in OUT/TABLE. The table is rewritten after each row, to OUT/TABLE.json,
    .md and .svg.
    """

    table: tyro.conf.Positional[str]
    """`table1` to `table9`, `figure4`, `figure5`, or `tarflow`; `flowback presets` shows their rows."""
    scale: Scale = "paper"
    """`paper`: the paper's size; `mini`: small versions on digits, about two minutes each on two cores;
    `fashion`: small flows on Fashion-MNIST."""
    seeds: int = 1
    """Runs of each row; a standard deviation needs two, a useful interval three or more."""
    first_seed: int = 0
    """Seed of the first run."""
    out: Path = Path("results")
    """Folder of tables and runs."""
    config: Annotated[Filling, tyro.conf.arg(name="")] = field(default_factory=Filling)
    sampling: Annotated[Drawing, tyro.conf.arg(name="")] = field(default_factory=Drawing)


def run(argv: list[str]) -> None:
    """Fill the table in, and show it."""
    options = parse(Options, argv, "reproduce")
    if options.seeds < 1 or options.first_seed < 0:
        raise InputError("--seeds must be at least 1, and --first-seed not negative.")
    from flowback.tables import reproduce

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    table = reproduce(options.table, options.scale, seeds, options.out, options.config, options.sampling)
    _show(table, options.out)


def _show(table: Table, out: Path) -> None:
    published = list(dict.fromkeys(name for row in table.rows for name in row.published))
    show_table(
        f"{table.file_name}: {table.title}",
        ["preset", *table.columns, *(f"paper: {name}" for name in published)],
        [
            [row.preset, *map(row.mean.get, table.columns), *map(row.published.get, published)]
            for row in table.rows
        ],
    )
    for row in table.rows:
        for seed, why in row.failures.items():
            say(f"{row.preset}, seed {seed}, failed: {why}")
    for sentence in (*table.notes, *table.warnings):
        say(sentence)
    say(f"Written to {out / table.file_name}.json and .md")
