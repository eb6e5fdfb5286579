"""``flowback train``: train a flow from a preset, changed by options and YAML; run again, it resumes."""

from __future__ import annotations

import json as jsonlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from flowback.checked import from_dict, to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.config import AlignmentConfig, CodecConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from flowback.errors import InputError
from flowback.files import write_json
from flowback.flow.cost import flops_per_image, parameters, training_bytes
from flowback.presets import get_preset
from flowback.provenance import environment
from flowback.reading import read_yaml
from flowback.training import start, train

__all__ = ["Options", "run"]


ASKED_FOR = {
    "test_nll": "test nll (nats/dim)",
    "test_top1_gradient": "test accuracy, gradient rule",
    "test_top1_exhaustive": "test accuracy, exhaustive rule",
    "fd_efficientnet_lite0": "Fréchet distance (EfficientNet-Lite0)",
    "nll": "training nll (nats/dim)",
    "images_per_second": "images per second",
    "seconds": "seconds of training",
}
"""Figures of a run's last row that are shown at its end, in this order."""


@dataclass(frozen=True)
class Options:
    """Train a flow. Run the same command again to continue where it stopped."""

    preset: tyro.conf.Positional[str]
    """Preset with the settings to start from; `flowback presets` lists them."""
    out: Annotated[Path, tyro.conf.arg(help_behavior_hint="")] = Path("runs/train")
    """The run's folder."""
    config: Path | None = None
    """YAML file of settings that replace the preset's; options replace the file's."""
    dry_run: bool = False
    """Print the resolved settings, parameters and memory estimate, and stop."""
    json: Path | None = None
    """Write the final figures to this file."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)


def run(argv: list[str]) -> None:
    """Train, and show where it ended."""
    options = parse(Options, argv, "train", _settings)
    student = get_preset(options.preset).config.student
    config = RunConfig(
        options.model, options.data, options.alignment, options.train, options.codec, student=student
    )
    if options.dry_run:
        _dry_run(config)
        return
    result = train(config, out=options.out, description=options.preset)
    row = result.metrics
    if not start(config.train).is_main_process:
        return
    shown = [[label, row[name]] for name, label in ASKED_FOR.items() if row.get(name) is not None]
    show_table(
        f"{options.preset} after {row['step']:,} steps, {row['images']:,} images",
        ["figure", "value"],
        shown,
        note=f"All others are in {options.out / 'metrics.jsonl'}.",
    )
    say(f"Checkpoint: {options.out}   (flowback sample {options.out} --out samples)")
    if options.json:
        record = {"environment": environment(result.device), "config": to_dict(result.config), "result": row}
        write_json(options.json, record)


def _settings(seen: Any) -> dict[str, Any]:
    """The preset's settings with those of ``--config`` on top, by section."""
    base = get_preset(seen.preset).config
    if seen.config is not None:
        base = _from_yaml(seen.config, base)
    return {name: getattr(base, name) for name in ("model", "data", "alignment", "train", "codec")}


def _from_yaml(file: Path, base: RunConfig) -> RunConfig:
    try:
        values = read_yaml(file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"--config {file} cannot be read: {reason}.") from None
    try:
        return from_dict(RunConfig, {} if values is None else values, base)
    except InputError as error:
        raise InputError(f"--config {file}: {error}") from None


def _dry_run(config: RunConfig) -> None:
    model, steps = config.model, config.train
    say(jsonlib.dumps(to_dict(config), indent=2))
    held: list[list[Any]] = [
        ["parameters (M)", parameters(model) / 1e6],
        ["GFLOP an image, encode pass", flops_per_image(model) / 1e9],
        ["GFLOP a training step", 3 * flops_per_image(model) * steps.batch_size / 1e9],
        [
            "estimated memory, one process (GiB)",
            training_bytes(model, steps.micro_batch or steps.batch_size, steps.precision) / 2**30,
        ],
    ]
    show_table("Dry run: nothing is written", ["", "value"], held)
