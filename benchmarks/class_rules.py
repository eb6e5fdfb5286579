"""Why the gradient rule trails the exhaustive one: accuracy on the way from all classes to one.

    python benchmarks/class_rules.py runs/none runs/reverse --json rules.json

Both rules compare log p(x | w) for weights w over the K classes. The exhaustive rule goes from equal weights,
1/K each, all the way to class k alone; the gradient rule takes the slope at the start. Weights of (1 - s)/K,
with s added at class k, lie between and show how much of the gap is curvature along the way. The normalised
rule divides each slope by the distance of the class's embeddings from their mean.

Each row is a flow at a noise level, with the accuracy of each rule and of each share s of the way. A flow is
asked at the level of its training; --noise asks it at others, too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowback import Flow, classify
from flowback.devices import pick_device
from flowback.evaluation.held_out import held_out_batches, matched, run_images
from flowback.flow.likelihood import add_noise
from harness import write_rows


@dataclass(frozen=True)
class Options:
    """Measure the rules of each run's flow on its test images."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or checkpoints."""
    json: Path
    """The file to write."""
    noise: tuple[float, ...] = ()
    """Further noise levels; each flow is asked at its own anyway."""
    shares: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """Shares s of the way; 1 is the exhaustive rule."""
    limit: int = 2000
    """Test images, spread evenly over the set."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, ..."""


@torch.no_grad()
def scores_at(flow: Flow, noised: Float[Tensor, "b c h w"], share: float) -> Float[Tensor, "b k"]:
    """log p(x | w) in nats for weights that have gone ``share`` of the way to each class."""
    classes = flow.config.num_classes or 0
    columns = []
    for k in range(classes):
        weights = torch.full((len(noised), classes), (1 - share) / classes, device=noised.device)
        weights[:, k] += share
        columns.append(flow(noised, weights.to(noised.dtype)).log_prob)
    return torch.stack(columns, dim=1)


def measure(flow: Flow, level: float, options: Options) -> dict[str, float]:
    """Accuracy of each rule at a noise level."""
    config = dataclasses.replace(flow.config, noise_std=level)
    right: dict[str, int] = {}
    images = matched(flow, run_images(flow, "test"))
    total = 0
    for batch in held_out_batches(flow, images, limit=options.limit, batch_size=100):
        noised = add_noise(batch.images, config, batch.seeds)
        assert batch.labels is not None
        found = {name: classify(flow, noised, name, noise=False) for name in ("gradient", "normalised")}
        found |= {f"share {share:g}": scores_at(flow, noised, share) for share in options.shares}
        for name, scores in found.items():
            right[name] = right.get(name, 0) + int((scores.argmax(1) == batch.labels).sum())
        total += len(batch.labels)
    return {name: count / total for name, count in right.items()}


def main() -> None:
    """Measure all, print, write."""
    options = tyro.cli(Options)
    device = pick_device(options.device, "--device")
    rows: list[dict[str, Any]] = []
    for run in options.runs:
        flow = Flow.from_pretrained(run, device)
        levels = dict.fromkeys((flow.config.noise_std, *options.noise))
        rows += [{"name": run.name, "noise": level, **measure(flow, level, options)} for level in levels]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.4g}" for value in row.values()))
    Console().print(table)
    write_rows(options.json, device, rows, settings=dataclasses.asdict(options))


if __name__ == "__main__":
    main()
