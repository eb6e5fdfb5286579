"""From the records of single runs to rows: means, differences, and how much sooner a row gets there."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowback.presets import Preset
from flowback.tables.result import Difference, Row, images_needed, paired_difference

__all__ = ["COLUMNS", "DISTANCES", "compared", "mixed", "summarise"]

DISTANCES = ("fd_efficientnet_lite0", "fid", "sfid", "inception_score")
"""Figures of samples."""

COLUMNS = (
    *("nll", "top1_gradient", "top1_normalised", "top1_exhaustive"),
    *(*DISTANCES, "best_linear"),
)
"""Figures of a row, where the evaluation gives them."""

_HIGHER_IS_BETTER = {
    "test_nll": False,
    "test_top1_gradient": True,
    "test_top1_normalised": True,
    "test_top1_exhaustive": True,
    "fd_efficientnet_lite0": False,
}
"""Figures along a run that tell how much sooner it reaches what its baseline ends with."""


def summarise(
    name: str,
    preset: Preset,
    published: dict[str, float],
    records: Mapping[int, tuple[Path, dict[str, Any]]],
    failures: dict[int, str],
) -> Row:
    """A row from its runs' records and their files, by seed."""
    contents = [record for _, record in records.values()]
    reports = [record["report"] for record in contents]
    figures = [report["figures"] for report in reports]
    values = {
        column: [float(each[column]) for each in figures]
        for column in COLUMNS
        if figures and all(each.get(column) is not None for each in figures)
    }
    return Row(
        preset=name,
        about=preset.about,
        seeds=list(records),
        values=values,
        mean={column: statistics.fmean(by_seed) for column, by_seed in values.items()},
        std={c: statistics.stdev(by_seed) if len(by_seed) > 1 else None for c, by_seed in values.items()},
        published=published,
        failures=failures,
        records=[str(file) for file, _ in records.values()],
        curves=_curves(contents),
        commits=[report["environment"]["commit"] for report in reports],
        devices=[report["environment"]["device"] for report in reports],
    )


def compared(rows: Sequence[Row], aligned: Mapping[str, bool], baseline: str | None) -> list[Row]:
    """The rows with their differences to ``baseline``.

    Without one, a row with alignment is compared with the last row above that has none, or with the first.
    """
    with_differences: list[Row] = []
    plain_row: Row | None = None
    for row in rows:
        if baseline is not None:
            other = next((each for each in rows if each.preset == baseline), None)
        else:
            plain_row = plain_row if aligned[row.preset] else row
            other = plain_row or rows[0]
        with_differences.append(_compared(row, other) if other is not None and other is not row else row)
    return with_differences


def mixed(rows: Sequence[Row]) -> list[str]:
    """What is not the same for all rows and is no setting."""
    warnings = []
    for what in ("commits", "devices"):
        values = sorted({str(value) for row in rows for value in getattr(row, what)})
        if len(values) > 1:
            warnings.append(f"The rows come from several {what}: {', '.join(values)}.")
    return warnings


def _compared(row: Row, baseline: Row) -> Row:
    differences = {figure: paired_difference(row, baseline, figure) for figure in row.values}
    return replace(
        row,
        baseline=baseline.preset,
        difference={figure: each for figure, each in differences.items() if each is not None},
        sooner=_sooner(row, baseline),
    )


def _sooner(row: Row, baseline: Row) -> dict[str, Difference]:
    """Ratio of images, baseline over row, until each first reaches the baseline's last value; by seed.

    Both are read from their curves: a baseline that has long been at its last value, but for the noise of the
    evaluations, gains nothing by a longer run. Where a seed never gets there the figure is left out: a mean
    over the others would flatter.
    """
    theirs = dict(zip(baseline.seeds, baseline.curves.get("training", ()), strict=False))
    ours = zip(row.seeds, row.curves.get("training", ()), strict=False)
    pairs = [(curve, theirs[seed]) for seed, curve in ours if seed in theirs]
    sooner = {}
    for figure, higher in _HIGHER_IS_BETTER.items():
        ratios = []
        for curve, other in pairs:
            if min(len(curve), len(other)) < 2:
                continue  # a single evaluation is no curve
            last = next((point for point in reversed(other) if figure in point), None)
            if last is None:
                continue
            needed, its_own = (images_needed(each, figure, last[figure], higher) for each in (curve, other))
            if needed and its_own:
                ratios.append(its_own / needed)
        if ratios and len(ratios) == len(pairs):
            sooner[figure] = Difference.of(ratios)
    return sooner


def _curves(records: Sequence[dict[str, Any]]) -> dict[str, list[list[dict[str, float]]]]:
    """What a row has to draw: for each seed, figures along the run, by guidance, by location."""
    figures = [record["report"]["figures"] for record in records]
    curves = {
        "training": [record["training"] for record in records],
        "guidance": [[_point(point) for point in each.get("guidance", [])] for each in figures],
        "locations": [_locations(each.get("locations", {})) for each in figures],
    }
    return {name: points for name, points in curves.items() if points and all(points)}


def _locations(by_place: Mapping[str, Mapping[str, float | None]]) -> list[dict[str, float]]:
    points = []
    for place, figures in by_place.items():
        block, layer = map(float, place.split("."))
        points.append({"block": block, "layer": layer, **_point(figures)})
    return points


def _point(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if value is not None}
