"""Curves of one small flow under each alignment strategy, several seeds, with the spread between them.

    python benchmarks/digits_strategies.py --json curves.json --plot curves.svg

Trains the preset `digits` (scikit-learn's 8 x 8 digits) without alignment and with `detach`, `reverse` of
order 0 and `reverse` `exact`, from the same seeds: all strategies start from the same weights and see the
same batches and noise. The test images are looked at every 100 steps. A stopped run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from flowback import presets, train
from flowback.checked import to_dict
from flowback.evaluation.held_out import held_out_figures
from harness import write_rows

STRATEGIES: dict[str, dict[str, Any]] = {
    "none": {"strategy": "none"},
    "detach": {"strategy": "detach"},
    "reverse, order 0": {"strategy": "reverse", "order": 0},
    "reverse, exact": {"strategy": "reverse", "order": "exact"},
}
FIGURES = {
    "nll": "nll of the noised test images (nats/dim)",
    "top1_gradient": "accuracy, gradient rule",
    "top1_exhaustive": "accuracy, exhaustive rule",
    "cosine": "cosine with the encoder's features",
}


@dataclass(frozen=True)
class Options:
    """Train every strategy from every seed, print and draw."""

    json: Path
    """The file to write."""
    plot: Path | None = None
    """Draw the curves here."""
    out: Path = Path("runs/digits-strategies")
    """Folder of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each strategy."""
    steps: int | None = None
    """Training steps; the preset's if left out."""


def one_run(name: str, seed: int, options: Options) -> dict[str, Any]:
    """Train, or read what stands there; the curve on the test images and the figures at the end."""
    base = presets.get("digits").config
    config = replace(
        base,
        alignment=replace(base.alignment, **STRATEGIES[name]),
        train=replace(base.train, steps=options.steps or base.train.steps, seed=seed, device="cpu"),
    )
    out = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    result = train(config, out=out, description=f"{name}, seed {seed}")
    test, last = result.test, result.metrics
    assert test is not None
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [
        {
            "images": row["images"],
            "nll": row["test_nll"],
            "top1_gradient": row["test_top1_gradient"],
            **({"cosine": -row["alignment"]} if "alignment" in row else {}),
        }
        for row in rows
        if "test_nll" in row
    ]
    final = held_out_figures(result.flow, test, len(test), exhaustive=True)
    if "alignment" in last:
        final["cosine"] = -last["alignment"]
    final["seconds"] = last["seconds"]
    return {"name": name, "seed": seed, "final": final, "curve": curve, "config": to_dict(result.config)}


def spread(runs: list[dict[str, Any]], figure: str) -> tuple[float, float] | None:
    """Mean and standard deviation over the seeds."""
    values = [run["final"][figure] for run in runs if figure in run["final"]]
    return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def plot(path: Path, runs: list[dict[str, Any]], device: str) -> None:
    """One panel a figure: the mean over seeds as a line, least and greatest as a band."""
    import matplotlib.pyplot as plt

    shown = ("nll", "top1_gradient", "cosine")
    figure, panels = plt.subplots(1, len(shown), figsize=(11, 3.6), layout="constrained")
    for color, name in enumerate(STRATEGIES):
        own = [run["curve"] for run in runs if run["name"] == name]
        for panel, key in zip(panels, shown, strict=True):
            if key not in own[0][0]:
                continue
            values = torch.tensor([[row[key] for row in curve] for curve in own])
            seen = [row["images"] for row in own[0]]
            panel.plot(seen, values.mean(0), color=f"C{color}", label=name)
            panel.fill_between(
                seen, values.amin(0), values.amax(0), color=f"C{color}", alpha=0.2, linewidth=0
            )
    for panel, key in zip(panels, shown, strict=True):
        panel.set(xlabel="images seen", title=FIGURES[key])
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    # Early values would squeeze the part where the strategies differ.
    late = [row for run in runs for row in run["curve"] if 3 * row["images"] > run["curve"][-1]["images"]]
    for panel, key in zip(panels[:2], shown[:2], strict=True):
        low, high = min(row[key] for row in late), max(row[key] for row in late)
        panel.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{len({run['seed'] for run in runs})} seeds, {device}", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Train all, print, write, draw."""
    options = tyro.cli(Options)
    runs = [one_run(name, seed, options) for seed in options.seeds for name in STRATEGIES]
    table = Table("strategy", *FIGURES)
    rows = []
    for name in STRATEGIES:
        own = [run for run in runs if run["name"] == name]
        row: dict[str, Any] = {"name": name}
        cells = []
        for figure in (*FIGURES, "seconds"):
            found = spread(own, figure)
            if found is not None:
                row[figure], row[f"{figure}_std"] = found
            if figure in FIGURES:
                cells.append("" if found is None else f"{found[0]:.4f} ± {found[1]:.4f}")
        rows.append(row)
        table.add_row(name, *cells)
    Console().print(table)
    device = torch.device("cpu")
    settings = {**dataclasses.asdict(options), "figures": FIGURES, "spread": "standard deviation over seeds"}
    write_rows(options.json, device, rows, settings=settings, runs=runs)
    if options.plot:
        plot(options.plot, runs, json.loads(options.json.read_text())["environment"]["device"])


if __name__ == "__main__":
    main()
