"""A picture of how runs went: their figures against images seen or seconds of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure

from flowback.errors import InputError
from flowback.files import replacing

__all__ = ["PANELS", "panel_grid", "plot_runs"]

PANELS = {
    "nll": ("nll (nats/dim)", {"nll": "-", "test_nll": "--"}),
    "accuracy": (
        "accuracy without a classifier",
        {"test_top1_gradient": "--", "test_top1_normalised": "-.", "test_top1_exhaustive": ":"},
    ),
    "fd": ("Fréchet distance (EfficientNet-Lite0)", {"fd_efficientnet_lite0": "--"}),
    "alignment": ("cosine with the encoder's features", {"cosine": "-"}),
    "grad_norm": ("norm of the gradient", {"grad_norm": "-"}),
    "speed": ("images/s", {"images_per_second": "-"}),
}
"""Each panel's label, and its figures with the style of their lines."""


def panel_grid(count: int, width: float, height: float, head: float) -> tuple[Figure, np.ndarray]:
    """A figure with ``count`` panels, at most three side by side, and its axes from the upper left on.

    Args:
        count: at least 1.
        width: of a panel, in inches.
        height: of a panel.
        head: further height, for the legend above.
    """
    wide = min(3, count)
    high = -(-count // wide)
    figure = Figure(figsize=(width * wide, head + height * high), layout="constrained")
    panels = figure.subplots(high, wide, squeeze=False).flatten()
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels


def plot_runs(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: Path,
    against: Literal["images", "seconds"] = "images",
) -> None:
    """Draw one panel for each kind of figure that the runs have, one colour a run.

    Args:
        runs: rows of metrics.jsonl, by the name of the run.
        path: of the picture; its ending gives the format.
        against: images seen, or seconds of training.

    Raises:
        InputError: no run has a row, or the format is unknown.
    """
    curves = {name: [_with_cosine(row) for row in rows if against in row] for name, rows in runs.items()}
    shown = {
        key: panel
        for key, panel in PANELS.items()
        if any(_points(rows, figure, against)[0] for rows in curves.values() for figure in panel[1])
    }
    if not shown:
        raise InputError(f"There is nothing to draw yet: {', '.join(runs)} has no row in metrics.jsonl.")
    figure, panels = panel_grid(len(shown), 4.6, 3.1, head=0.5)
    for axes, (label, figures) in zip(panels, shown.values(), strict=False):
        for number, (name, rows) in enumerate(curves.items()):
            for kind, style in figures.items():
                places, values = _points(rows, kind, against)
                if places:
                    what = kind.removeprefix("test_top1_").replace("test_nll", "test")
                    label_of = f"{name}, {what}" if len(figures) > 1 else name
                    axes.plot(places, values, style, marker=".", color=f"C{number}", label=label_of)
        axes.set(xlabel="images seen" if against == "images" else "seconds of training", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, framealpha=0.5)
    kind = path.suffix.removeprefix(".") or "png"
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{path}: pictures of the kind .{kind} are not known; name it .png, .svg or .pdf.")
    with replacing(path, "wb") as file:
        figure.savefig(file, format=kind, dpi=120)


def _with_cosine(row: Mapping[str, Any]) -> dict[str, Any]:
    """The alignment loss is minus a cosine."""
    alignment = row.get("alignment")
    return {**row, "cosine": None if alignment is None else -alignment}


def _points(rows: Sequence[Mapping[str, Any]], figure: str, against: str) -> tuple[list[float], list[float]]:
    points = [(float(row[against]), float(row[figure])) for row in rows if row.get(figure) is not None]
    return [place for place, _ in points], [value for _, value in points]
