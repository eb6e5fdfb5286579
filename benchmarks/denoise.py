"""Time and memory of denoising in steps, against as many forward passes with a gradient by the images.

    python benchmarks/denoise.py --json denoise.json

A flow of 64×64 images, patch 4, 4 blocks of 4 layers, with a range of noise levels. A row is a method with n
levels; ``ratio`` is its time over that of its evaluations, each one forward pass and the gradient of the
log-density by a batch of images, the weights frozen (goal: at most 1.1), as the median over the turns.
``peak_bytes`` is what a batch needs at most, in a fresh process; the row ``gradient`` is one evaluation, and
``gradient-of-all`` one in which the weights are not frozen, so that their activations are kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from flowback import Flow, ModelConfig
from flowback.provenance import environment
from flowback.sampling.denoise import Denoising, denoised_states
from flowback.sampling.solver import Method, evaluations
from harness import interleave, peak_bytes, peak_in_fresh_process, write_rows

CLASSES = 10
LEVELS = (0.3, 0.01)
"""The highest and the lowest."""


@dataclass(frozen=True)
class Options:
    """Time denoising in steps."""

    json: Path | None = None
    """The file to write."""
    steps: tuple[int, ...] = (1, 4, 10)
    """Noise levels of a row."""
    methods: tuple[Method, ...] = ("euler", "heun", "stochastic")
    """How to go from level to level."""
    width: int = 256
    """Of the Transformer."""
    image_size: int = 64
    """Height and width of the images."""
    batch: int = 16
    """Images."""
    repeats: int = 5
    """Turns that count, after one that does not."""
    device: str = "cpu"
    """Where all of it runs."""
    memory_of: str | None = None
    """Print the peak memory of one row, and stop; the script calls itself so."""


def make(name: str, options: Options, device: torch.device) -> Callable[[], object]:
    """What a row runs: `gradient`, `gradient-of-all`, or a method and its number of levels."""
    torch.manual_seed(0)
    flow = Flow(
        ModelConfig(
            image_size=options.image_size, patch_size=4, width=options.width, blocks=4, layers=4,
            num_classes=CLASSES, noise="range", noise_min=LEVELS[1], noise_max=LEVELS[0],
        )
    )  # fmt: skip
    for block in flow.blocks:  # zero in a new flow, and then gradients stop there
        torch.nn.init.normal_(block.proj_out.weight, std=0.01)
    flow.to(device).eval().requires_grad_(name == "gradient-of-all")
    generator = torch.Generator().manual_seed(0)
    size = (options.batch, 3, options.image_size, options.image_size)
    images = (2 * torch.rand(size, generator=generator) - 1).to(device)
    labels = torch.randint(CLASSES, (options.batch,), generator=generator).to(device)

    def gradient() -> object:
        x = images.clone().requires_grad_()
        return torch.autograd.grad(flow(x, labels, noise=LEVELS[0]).log_prob.sum(), x)

    if name.startswith("gradient"):
        return gradient
    method, steps = name.split("-")
    denoising = Denoising(int(steps), method)  # type: ignore[arg-type]  # one of the methods, by its name
    return lambda: list(denoised_states(flow, images, labels, denoising, lambda _: images))


def measure(options: Options, device: torch.device) -> list[dict[str, Any]]:
    """All rows."""
    rows = {f"{method}-{steps}": (method, steps) for method in options.methods for steps in options.steps}
    names = ["gradient", "gradient-of-all", *rows]
    calls = {name: make(name, options, device) for name in names if name != "gradient-of-all"}
    seconds = interleave(calls, device, options.repeats)
    found: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"name": name, "peak_bytes": peak_of(name, options)}
        if name in calls:
            row["seconds"] = statistics.median(seconds[name])
        if name in rows:
            method, steps = rows[name]
            row["evaluations"] = evaluations(steps, method)
            turns = zip(seconds[name], seconds["gradient"], strict=True)
            row["ratio"] = statistics.median(own / (row["evaluations"] * one) for own, one in turns)
        found.append(row)
    return found


def peak_of(name: str, options: Options) -> int:
    """Bytes that a row needs beyond flow and images, in a fresh process."""
    sizes = ["--width", options.width, "--image-size", options.image_size, "--batch", options.batch]
    words = ["--memory-of", name, "--device", options.device, *sizes]
    return peak_in_fresh_process([str(word) for word in words])


def main() -> None:
    """Time, print and write."""
    options = tyro.cli(Options, prog="denoise.py")
    device = torch.device(options.device)
    if options.memory_of:
        print(peak_bytes(make(options.memory_of, options, device), device))
        return
    console = Console()
    console.print(f"{environment(device)['device']}; batch {options.batch}")
    rows = measure(options, device)
    table = Table("row", "evaluations", "seconds", "ratio", "peak MB")
    for row in rows:
        table.add_row(
            row["name"],
            str(row.get("evaluations", "")),
            f"{row['seconds']:.3f}" if "seconds" in row else "",
            f"{row['ratio']:.3f}" if "ratio" in row else "",
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    console.print(table)
    if options.json:
        write_rows(options.json, device, rows, batch=options.batch, width=options.width)


if __name__ == "__main__":
    main()
