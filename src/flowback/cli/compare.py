"""``flowback compare``: two reports side by side, and what differs in their settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.files import write_json

__all__ = ["Options", "run"]

MANY = 60
"""Figures in one table, at most; the JSON file has all."""


@dataclass(frozen=True)
class Options:
    """Show the figures of two reports, and the settings, versions and devices in which they differ."""

    a: tyro.conf.Positional[Path]
    """A report written by `flowback evaluate`, `classify` or `probe`."""
    b: tyro.conf.Positional[Path]
    """Another report."""
    json: Path | None = None
    """Write the comparison to this file."""


def run(argv: list[str]) -> None:
    """Read both, compare, show."""
    options = parse(Options, argv, "compare")
    from flowback.evaluation.report import Report, compare

    reports = [Report.load(path) for path in (options.a, options.b)]
    comparison = compare(*reports)
    names = [str(options.a), str(options.b)]
    rows = [[name, a, b, _difference(a, b)] for name, a, b in comparison.figures]
    show_table("Figures", ["figure", *names, "B − A"], rows[:MANY])
    if len(rows) > MANY:
        say(f"{len(rows) - MANY} more figures; --json FILE writes them all.")
    for title, differing in (
        ("Settings that differ", comparison.settings),
        ("Environment", comparison.environment),
    ):
        if differing:
            show_table(title, ["", *names], [[name, _text(a), _text(b)] for name, a, b in differing])
    if not comparison.settings:
        say("The settings are the same.")
    for name, report in zip(names, reports, strict=True):
        for warning in report.warnings:
            say(f"Warning ({name}): {warning}")
    if options.json is not None:
        write_json(options.json, {"reports": names, **comparison._asdict()})


def _difference(a: Any, b: Any) -> float | None:
    return float(b - a) if isinstance(a, (int, float)) and isinstance(b, (int, float)) else None


def _text(value: Any) -> str:
    return "–" if value is None else str(value)
