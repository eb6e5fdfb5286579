"""Pictures of a table: each figure by row, and curves along the runs, over guidance or over locations."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowback.files import replacing
from flowback.tables.result import Row, Table
from flowback.training.curves import panel_grid

__all__ = ["draw"]


class _Curve(NamedTuple):
    """How a kind of curve is drawn."""

    points: str
    """Which points of a row."""
    x: str
    label: str
    figures: dict[str, str]
    """Those that get a panel, and their labels."""


_ALONG_RUNS = {
    "test_nll": "test nll (nats/dim)",
    "fd_efficientnet_lite0": "Fréchet distance (EfficientNet-Lite0)",
    "test_top1_gradient": "accuracy, gradient rule",
    "test_top1_normalised": "accuracy, normalised rule",
    "test_top1_exhaustive": "accuracy, exhaustive rule",
}

_CURVES = {
    "training": _Curve("training", "images", "images seen", _ALONG_RUNS),
    "seconds": _Curve("training", "seconds", "seconds of training", _ALONG_RUNS),
    "guidance": _Curve(
        "guidance",
        "guidance",
        "guidance scale",
        {"fid": "FID", "fd_efficientnet_lite0": "Fréchet distance (EfficientNet-Lite0)"},
    ),
    "locations": _Curve(
        "locations",
        "place",
        "block.layer (block 1 is next to the data)",
        {"linear": "accuracy of a linear probe", "knn": "accuracy of nearest neighbours"},
    ),
}


def draw(table: Table, folder: Path) -> None:
    """Write NAME.svg, and NAME-KIND.svg for training, seconds, guidance and locations, where it has points.

    Points are means over seeds, small dots are seeds; bars and bands reach one standard deviation each way.
    """
    rows = [row for row in table.rows if row.seeds]
    if not rows or not table.columns:
        return
    _save(_by_row(table, rows), folder / f"{table.file_name}.svg")
    for name, kind in _CURVES.items():
        drawn = [row for row in rows if len(row.curves.get(kind.points, [[]])[0]) > 1]
        if drawn:
            _save(_along(drawn, kind), folder / f"{table.file_name}-{name}.svg")


def _by_row(table: Table, rows: list[Row]) -> Figure:
    """One panel a figure, one line a row."""
    count = len(table.columns)
    figure = Figure(figsize=(2.4 + 2.4 * count, 1.0 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, table.columns, strict=True):
        for place, row in enumerate(rows):
            if column not in row.mean:
                continue
            values = row.values[column]
            axes.plot(values, [place] * len(values), ".", color="0.6", markersize=4)
            axes.errorbar(
                row.mean[column], place, xerr=row.std[column] or 0.0, fmt="o", capsize=2, color="C0"
            )
        axes.set_xlabel(column)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row.preset for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _along(rows: list[Row], kind: _Curve) -> Figure:
    """One panel a figure of the curves, one line a row."""
    first = rows[0].curves[kind.points][0]
    figures = {key: label for key, label in kind.figures.items() if any(key in point for point in first)}
    figure, panels = panel_grid(len(figures), 4.8, 3.2, head=0.4)
    for axes, (key, label) in zip(panels, figures.items(), strict=False):
        for number, row in enumerate(rows):
            _band(axes, row, kind, key, "-" if number < 10 else "--")  # ten colours
        if kind.points == "locations":
            axes.set_xticks(range(len(first)), [f"{p['block']:g}.{p['layer']:g}" for p in first], fontsize=7)
            for row, line in zip(rows, list(axes.get_lines()), strict=True):  # the training-free score
                axes.axhline(row.mean["top1_gradient"], ls="--", lw=1, color=line.get_color())
        axes.set(xlabel=kind.label, ylabel=label)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(rows)), fontsize=8)
    return figure


def _band(axes: Axes, row: Row, kind: _Curve, key: str, style: str) -> None:
    """Mean over seeds, and a band of one standard deviation."""
    runs = [[point for point in run if key in point] for run in row.curves[kind.points]]
    points = list(zip(*runs, strict=False))  # a run of other evaluations is drawn as far as all go
    places = [statistics.fmean(p.get(kind.x, float(number)) for p in at) for number, at in enumerate(points)]
    values = [[point[key] for point in at] for at in points]
    means = [statistics.fmean(each) for each in values]
    (line,) = axes.plot(places, means, marker=".", ls=style, label=row.preset)
    if len(runs) > 1:
        spreads = [statistics.stdev(each) for each in values]
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, lw=0)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path, "wb") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
