"""``flowback presets``: the presets, with published and measured results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from flowback.checked import to_dict
from flowback.cli.console import show_table
from flowback.cli.options import parse
from flowback.files import write_json
from flowback.presets import PRESETS, list_presets

__all__ = ["Options", "run"]

UTILISATION = 0.4
"""Share of an H100's bf16 peak that the estimated days assume."""


AT_ONCE = 64
"""Images in the estimated memory."""


@dataclass(frozen=True)
class Options:
    """List the presets, with what the papers published and what flowback measured.

    A narrow terminal shows fewer columns; a pipe gets all of them, one line per preset.
    """

    pattern: tyro.conf.Positional[str] = "*"
    """Only those whose names match, with `*` for anything: `flowback presets "imagenet64*"`."""
    json: Path | None = None
    """Write the list, with all settings, to this file."""


def run(argv: list[str]) -> None:
    """Print the table."""
    options = parse(Options, argv, "presets")
    from flowback.flow.cost import flops_per_image, parameters, training_bytes, training_days
    from flowback.provenance import environment

    rows: list[dict[str, Any]] = []
    for name in list_presets(options.pattern):
        preset = PRESETS[name]
        model, train = preset.config.model, preset.config.train
        rows.append(
            {
                "name": name,
                "about": preset.about,
                "parameters": parameters(model),
                "flops_per_image": flops_per_image(model),
                "training_bytes": training_bytes(model, AT_ONCE, train.precision),
                "h100_days": training_days(model, train.steps * train.batch_size, UTILISATION),
                "published": preset.published,
                "measured": preset.measured,
                "config": to_dict(preset.config),
            }
        )
    show_table(
        "Presets",
        ["name", "about", "M params", "GFLOP/image", "GiB", "H100 days", "published", "measured"],
        [
            [
                row["name"],
                row["about"],
                row["parameters"] / 1e6,
                row["flops_per_image"] / 1e9,
                row["training_bytes"] / 2**30,
                row["h100_days"],
                _figures(row["published"]) or "–",
                _figures(row["measured"]) or "none yet",
            ]
            for row in rows
        ],
        optional=5,
        note="GFLOP: an encode pass; a training step takes three times as much for each image. "
        f"GiB: estimated for {AT_ONCE} images at once (--train.micro-batch). "
        f"H100 days: estimated for one, at {UTILISATION:.0%} of its bf16 peak, without alignment. "
        "Published: the papers' numbers. Measured: by this project, on a CPU, seed 0 (docs/results.md).",
    )
    if options.json:
        record = {"environment": environment(), "utilisation": UTILISATION, "images_at_once": AT_ONCE}
        write_json(options.json, {**record, "presets": rows})


def _figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
