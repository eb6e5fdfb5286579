"""Pictures of evaluations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from flowback.evaluation.linear_probe import Probe
from flowback.files import replacing
from flowback.sampling.image_files import fonts

__all__ = ["plot_confusion", "plot_guidance", "plot_probe"]

NAMED_CLASSES = 40
"""Up to so many classes are named on the axes."""

NUMBERED_CLASSES = 20
"""Up to so many classes get the number of images in every cell."""


def plot_confusion(confusion: Int[Tensor, "k k"], classes: Sequence[str], title: str, path: Path) -> None:
    """Confusion matrix: colour is the share of the true class, numbers count images."""
    share = (confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    side = 4.5 + 0.18 * min(len(classes), NAMED_CLASSES)
    figure, axes = _figure(side + 0.8, side)
    shades = axes.imshow(share, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(shades, ax=axes, format=PercentFormatter(1), shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="class", title=title)
    if len(classes) <= NAMED_CLASSES:
        ticks = range(len(classes))
        long = max(map(len, classes), default=0) > 3
        plain: dict[str, Any] = {"fontfamily": fonts(), "parse_math": False}  # a name may hold any sign
        axes.set_xticks(ticks, classes, rotation=90 if long else 0, **plain)
        axes.set_yticks(ticks, classes, **plain)
    if len(classes) <= NUMBERED_CLASSES:
        for row, counts in enumerate(confusion.tolist()):
            for column, count in enumerate(counts):
                if count:
                    colour = "white" if share[row, column] > 0.5 else "black"
                    axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    _save(figure, path)


def plot_probe(result: Probe, path: Path) -> None:
    """Accuracy by location, the training-free score dashed (arXiv 2511.22345, Fig. 4)."""
    probes, training_free = result.locations, result.top1_gradient
    figure, axes = _figure(max(6.0, 1.5 + 0.28 * len(probes)), 4.0)
    places = range(len(probes))
    axes.plot(places, [probe.linear for probe in probes], "o-", label="linear probe", markersize=4)
    axes.plot(
        places, [probe.knn for probe in probes], "s-", label="nearest neighbours", markersize=3, alpha=0.7
    )
    if training_free is not None:
        axes.axhline(training_free, ls="--", color="black", lw=1, label="training-free classification")
    aligned = [probe.cknna for probe in probes if probe.cknna is not None]
    if aligned:
        other = axes.twinx()
        other.plot(places, aligned, ":", color="tab:green")
        other.set_ylabel("CKNNA", color="tab:green")
        other.set_ylim(bottom=0)
        axes.plot([], [], ":", color="tab:green", label="CKNNA with the encoder (right)")
    for place, probe in enumerate(probes):
        if place and probe.location[0] != probes[place - 1].location[0]:
            axes.axvline(place - 0.5, color="0.85", lw=1, zorder=0)
    axes.set_xticks(places, [f"{block}.{layer}" for block, layer in (p.location for p in probes)], fontsize=8)
    if len(probes) > 20:
        axes.tick_params(axis="x", rotation=90)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="block.layer (block 1 is next to the data)", ylabel="accuracy on test images")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    _save(figure, path)


def plot_guidance(
    scales: Sequence[float], figures: dict[str, Sequence[float]], best: float, path: Path
) -> None:
    """Each figure against the guidance scale, one panel below the other."""
    figure = Figure(figsize=(6, 0.8 + 2.2 * len(figures)), layout="constrained")
    panels = figure.subplots(len(figures), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, figures.items(), strict=True):
        axes.plot(scales, values, "o-", markersize=4)
        axes.axvline(best, ls="--", color="0.4", lw=1)
        axes.set_ylabel(name)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    panels[-1].set_xlabel("guidance scale")
    panels[0].set_title(f"best: {best:g} (dashed)", fontsize=10)
    _save(figure, path)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> None:
    with replacing(path, "wb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands there
        figure.savefig(file, dpi=150, format="png")
