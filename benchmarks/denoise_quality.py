"""Quality of samples by steps of denoising and by the level they are drawn at.

    python benchmarks/denoise_quality.py runs/range-0 runs/range-1 runs/range-2 --steps 1 3 10 \
        --levels 0.1 0.2 0.35 0.5 --against runs/fixed-0 runs/fixed-1 runs/fixed-2 --json denoise.json

Every row is one setting, with the Fréchet distance of the samples of each run to the training images of its
data, their mean and standard deviation. Flows of one level take part with one step, at their level. Images of
a seed start from the same noise in all rows. The figure beside the JSON shows the distance by steps, a line
for each level that images are drawn at.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import tyro
from rich.console import Console
from rich.table import Table

from flowback import Flow, SampleConfig, evaluate
from flowback.checked import to_dict
from flowback.devices import pick_device
from harness import write_rows

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass(frozen=True)
class Options:
    """Measure the samples of runs, for each number of steps and each level that they are drawn at."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs of one setting, which differ in their seed, with a range of noise levels."""
    json: Path
    """The file to write."""
    against: tuple[Path, ...] = ()
    """Runs of one noise level to compare with."""
    steps: tuple[int, ...] = (1, 2, 5, 10)
    """Steps of denoising."""
    levels: tuple[float, ...] = ()
    """Levels that images are drawn at; none given: the highest of training."""
    method: Literal["euler", "heun", "stochastic"] = "euler"
    """How a step is made."""
    spacing: Literal["linear", "log", "edm"] = "linear"
    """How the levels of the steps are spaced."""
    samples: int = 1000
    """Samples of each run."""
    guidance: float = 0.3
    """Guidance scale."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


def measure(flows: Sequence[Flow], level: float | None, steps: int, options: Options) -> dict[str, Any]:
    """A row: distances of the flows' samples, drawn at a level (None: their own) and denoised in steps."""
    sampling = SampleConfig(guidance=options.guidance, noise=level)
    if level is not None:
        sampling = dataclasses.replace(
            sampling,
            denoise_steps=steps,
            denoise_method=options.method,
            denoise_spacing=options.spacing,
        )
    started = time.perf_counter()
    values = []
    for flow in flows:
        report = evaluate(
            flow,
            sampling=sampling,
            samples=options.samples,
            reference_limit=None,
            likelihood=False,
            classification=False,
        )
        values.append(report.figures["fd_efficientnet_lite0"])
    return {
        "kind": flows[0].config.noise,
        "level": flows[0].config.noise_std if level is None else level,
        "steps": steps,
        "values": values,
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seconds": (time.perf_counter() - started) / len(flows),
    }


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Distance by steps, a line for each level; of flows of one level, a dashed one."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for level in sorted({row["level"] for row in rows if row["kind"] == "range"}):
        line = [row for row in rows if row["kind"] == "range" and row["level"] == level]
        spread = [row["std"] or 0.0 for row in line]
        axes.errorbar(
            [row["steps"] for row in line],
            [row["mean"] for row in line],
            spread,
            marker="o",
            capsize=3,
            label=f"drawn at {level:g}",
        )
    for row in rows:
        if row["kind"] != "range":
            axes.axhline(row["mean"], color="black", linestyle="--", label=f"only {row['level']:g}, one step")
    axes.set(xlabel="steps of denoising", ylabel="Fréchet distance (EfficientNet-Lite0)", xscale="log")
    axes.legend()
    figure.savefig(file)


def main() -> None:
    """Draw, compare, print, write."""
    options = tyro.cli(Options)
    device = pick_device(options.device)
    flows = [Flow.from_pretrained(str(run), device=str(device)) for run in options.runs]
    against = [Flow.from_pretrained(str(run), device=str(device)) for run in options.against]
    levels = options.levels or (flows[0].config.noise_max,)
    rows: list[dict[str, Any]] = []
    table = Table("level", "steps", "Fréchet distance", "deviation", "seconds")
    asked: list[tuple[list[Flow], float | None, int]] = [(against, None, 1)] if against else []
    for group, level, count in asked + [(flows, level, count) for level in levels for count in options.steps]:
        row = measure(group, level, count, options)
        rows.append(row)
        deviation = "" if row["std"] is None else f"{row['std']:.1f}"
        table.add_row(
            f"{row['level']:g}", str(count), f"{row['mean']:.1f}", deviation, f"{row['seconds']:.0f}"
        )
        write_rows(options.json, device, rows, settings=to_dict(options))
    Console().print(table)
    draw(rows, options.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
