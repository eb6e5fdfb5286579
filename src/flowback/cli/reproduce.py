"""``flowback reproduce``: train and evaluate the rows of a table one after the other, and fill it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from flowback.cli.console import say, show_table
from flowback.config import SampleConfig
from flowback.errors import InputError
from flowback.tables import ReproduceConfig, Scale, Table, reproduce

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """Reproduce a table of the paper, row by row; the same command skips what is done and goes on.

    Runs lie under OUT/runs, full records under OUT/TABLE. The table is written anew after each row, to
    OUT/TABLE.json, .md and .svg.
    """

    table: tyro.conf.Positional[str]
    """`table1` to `table9`, `figure4`, `figure5`, or `tarflow`; `flowback presets` shows their rows."""
    scale: Scale = "paper"
    """The paper's size; its small siblings on digits (about two minutes each on two cores); or
    Fashion-MNIST (about half an hour each on one core)."""
    seeds: int = 1
    """Runs of each row; a standard deviation takes two, an interval worth reading three or more."""
    first_seed: int = 0
    """Seed of the first."""
    out: Path = Path("results")
    """Folder of tables and runs."""
    config: tyro.conf.OmitArgPrefixes[ReproduceConfig] = field(default_factory=ReproduceConfig)
    sampling: SampleConfig = field(default_factory=SampleConfig)


def run(argv: list[str]) -> None:
    """Fill the table in, and show it."""
    options = tyro.cli(Options, args=argv, prog="flowback reproduce")
    if options.seeds < 1 or options.first_seed < 0:
        raise InputError("--seeds must be at least 1, and --first-seed not negative.")
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
