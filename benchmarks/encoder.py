"""Features a second of an encoder, with its batch norms folded into its convolutions and with both apart.

    python benchmarks/encoder.py --json encoder.json

Both take turns on the same grey images of 28×28 pixels; ``ratio`` is the time of the one with both apart over
that of the row. The process keeps freed memory in both (:mod:`flowback.heap`).
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro

from flowback import Encoder, create_encoder
from flowback.alignment import batch_norms
from flowback.devices import pick_device
from harness import interleave, write_rows


@dataclass(frozen=True)
class Options:
    """Time an encoder."""

    json: Path
    """The file to write."""
    encoder: str = "efficientnet_lite0"
    """Its name, as in `--alignment.encoder`."""
    grids: tuple[int, ...] = (7, 14)
    """Patches along one side of an image."""
    batch: int = 64
    """Images."""
    repeats: int = 7
    """Times that each call is timed; the median is kept."""
    device: str = "cpu"
    """Where all of it runs."""


def encoders(options: Options, device: torch.device) -> dict[str, Encoder]:
    """The encoder as it is, and with norms of their own."""
    with mock.patch.object(batch_norms, "foldable", return_value=[]):
        apart = create_encoder(options.encoder)
    return {"folded": create_encoder(options.encoder).to(device), "apart": apart.to(device)}


def main() -> None:
    """Time, write."""
    options = tyro.cli(Options)
    device = pick_device(options.device)
    made, rows = encoders(options, device), list[dict[str, Any]]()
    images = 2 * torch.rand(options.batch, 1, 28, 28, generator=torch.Generator().manual_seed(0)) - 1
    images = images.to(device)
    for grid in options.grids:
        calls = {name: lambda e=encoder, g=grid: e(images, g) for name, encoder in made.items()}
        seconds = interleave(calls, device, options.repeats)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in median.items():
            row: dict[str, Any] = {"name": f"{name}-{made[name].input_size(grid)}", "seconds": value}
            row["features_per_second"] = options.batch / value
            row["ratio"] = median["apart"] / value
            row["largest_difference"] = float(
                (made[name](images, grid) - made["apart"](images, grid)).abs().max()
            )
            rows.append({**row, "all_seconds": seconds[name]})
            print(
                "  ".join(f"{key} {item:.4g}" if key != "name" else f"{item:12}" for key, item in row.items())
            )
    write_rows(options.json, device, rows, settings=dataclasses.asdict(options))


if __name__ == "__main__":
    main()
