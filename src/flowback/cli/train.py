"""``flowback train``: train a flow from a preset, changed by options and YAML; run again, it resumes."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from flowback.checked import from_dict, to_dict
from flowback.cli.console import say, show_table
from flowback.cli.options import parse
from flowback.config import AlignmentConfig, CodecConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from flowback.errors import InputError
from flowback.files import write_json

if TYPE_CHECKING:
    from flowback.training import TrainResult, Trial

__all__ = ["Options", "run", "show_run"]


BAD_SHOWN = 8
"""Files that cannot be read, as --dry-run names them."""

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
    out: Path = Path("runs/train")
    """The run's folder; a run that is there goes on."""
    config: Path | None = None
    """YAML file of settings that replace the preset's; options replace the file's."""
    dry_run: bool = False
    """Look at the data, try a step, print the settings with memory and time, and stop; nothing is written."""
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
    from flowback.presets import get_preset

    student = get_preset(options.preset).config.student
    config = RunConfig(
        options.model, options.data, options.alignment, options.train, options.codec, student=student
    )
    if options.dry_run:
        _dry_run(config)
        return
    from flowback.training import start, train

    result = train(config, out=options.out, description=options.preset)
    if start(config.train).is_main_process:
        show_run(result, options.preset, ASKED_FOR, options.out, options.json)
        say(f"Checkpoint: {options.out}   (flowback sample {options.out} --out samples)")


def show_run(result: TrainResult, name: str, asked: Mapping[str, str], out: Path, json: Path | None) -> None:
    """The figures at the end of a run that people ask for, by their labels; all of them go to ``json``."""
    from flowback.provenance import environment

    row = result.metrics
    shown = [[label, row[figure]] for figure, label in asked.items() if row.get(figure) is not None]
    title = f"{name} after {row['step']:,} steps, {row['images']:,} images"
    show_table(title, ["figure", "value"], shown, note=f"All others are in {out / 'metrics.jsonl'}.")
    if json:
        record = {"environment": environment(result.device), "config": to_dict(result.config), "result": row}
        write_json(json, record)


def _settings(seen: Any) -> dict[str, Any]:
    """The preset's settings with those of ``--config`` on top, by section."""
    from flowback.presets import get_preset

    base = get_preset(seen.preset).config
    if seen.config is not None:
        base = _from_yaml(seen.config, base)
    return {name: getattr(base, name) for name in ("model", "data", "alignment", "train", "codec")}


def _from_yaml(file: Path, base: RunConfig) -> RunConfig:
    from flowback.reading import problem, read_yaml

    try:
        values = read_yaml(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--config {file} cannot be read: {problem(error)}.") from None
    try:
        return from_dict(RunConfig, {} if values is None else values, base)
    except InputError as error:
        raise InputError(f"--config {file}: {error}") from None


def _dry_run(config: RunConfig) -> None:
    """Show the settings, and what the run will take; with a step tried, if its data are named."""
    from flowback.flow.cost import flops_per_image, parameters, training_bytes
    from flowback.training import try_run

    model, train = config.model, config.train
    unnamed = config.data.path is None and config.data.name in ("folder", "prepared")
    trial = None if unnamed else try_run(config)
    say(jsonlib.dumps(to_dict(config if trial is None else trial.config), indent=2))
    held: list[list[Any]] = [
        ["parameters (M)", parameters(model) / 1e6],
        ["GFLOP an image, encode pass", flops_per_image(model) / 1e9],
        ["GFLOP a training step", 3 * flops_per_image(model) * train.batch_size / 1e9],
    ]
    if trial is None:
        size = training_bytes(model, train.micro_batch or train.batch_size, train.precision)
        held.append(["estimated memory of a step (GiB)", size / 2**30])
    else:
        held += _images_of(trial) + _costs_of(trial)
    show_table("Dry run: nothing is written", ["", "value"], held)
    if trial is None:
        say("No data are named yet: give --data FOLDER, and --dry-run looks at the images and tries a step.")


def _images_of(trial: Trial) -> list[list[Any]]:
    """Counts, names and sizes; the files that are left out."""
    from flowback.training import classes_shown

    images, model = trial.images, trial.config.model
    tested = "none" if trial.test is None else f"{len(trial.test):,}"
    rows: list[list[Any]] = [
        ["training images", f"{len(images):,} of {images.name}"],
        ["test images", tested],
        ["size", f"{model.image_size}x{model.image_size}x{model.channels}"],
        ["classes", classes_shown(images.classes)],
    ]
    bad = [*images.skipped, *(trial.test.skipped if trial.test is not None else ())]
    more = f" and {len(bad) - BAD_SHOWN} more" if len(bad) > BAD_SHOWN else ""
    return [*rows, ["files left out", ", ".join(bad[:BAD_SHOWN]) + more or "none"]]


def _costs_of(trial: Trial) -> list[list[Any]]:
    """Memory, and time by the step that was tried."""
    rows: list[list[Any]] = [["estimated memory, one process (GiB)", trial.memory / 2**30]]
    if trial.step_seconds is None or trial.seconds is None:
        return [*rows, ["time", "a step is too large to be tried on this device"]]
    if trial.encoder_seconds:
        rows.append(["features of all images, once", _duration(trial.encoder_seconds)])
    return [
        *rows,
        ["images/s, by a step that was tried", trial.config.train.batch_size / trial.step_seconds],
        ["time on this device, one process", _duration(trial.seconds)],
    ]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(1, round(seconds))))
