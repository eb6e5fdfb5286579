"""``flowback presets``: the presets, with published and measured results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from flowback.cli.output import show_table
from flowback.config import to_dict
from flowback.flow.cost import flops_per_image, parameters
from flowback.presets import PRESETS
from flowback.record import environment, write_json

__all__ = ["Options", "run"]


@dataclass(frozen=True)
class Options:
    """List the presets, with what the papers published and what flowback measured."""

    json: Path | None = None
    """Write the list, with all settings, to this file."""


def run(argv: list[str]) -> None:
    """Print the table."""
    options = tyro.cli(Options, args=argv, prog="flowback presets")
    rows: list[dict[str, Any]] = []
    for name, preset in PRESETS.items():
        model = preset.config.model
        rows.append(
            {
                "name": name,
                "about": preset.about,
                "parameters": parameters(model),
                "flops_per_image": flops_per_image(model),
                "published": preset.published,
                "measured": preset.measured,
                "config": to_dict(preset.config),
            }
        )
    show_table(
        "Presets (published: the paper's numbers)",
        ["name", "about", "M params", "GFLOP/image", "published", "measured"],
        [
            [
                row["name"],
                row["about"],
                row["parameters"] / 1e6,
                row["flops_per_image"] / 1e9,
                ", ".join(f"{key} {value:g}" for key, value in row["published"].items()) or "–",
                row["measured"],
            ]
            for row in rows
        ],
    )
    if options.json:
        write_json(options.json, {"environment": environment(), "presets": rows})
