"""``flowback distil``: train a student of a checkpoint; run again, it resumes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flowback.cli.console import say
from flowback.cli.options import parse
from flowback.cli.train import show_run
from flowback.config import DataConfig, RunConfig, StudentConfig, TrainConfig
from flowback.errors import InputError

__all__ = ["Options", "run"]

SHOWN = {
    "loss": "training loss",
    "image": "image loss",
    "velocity": "velocity loss",
    "fd_efficientnet_lite0": "Fréchet distance (EfficientNet-Lite0)",
    "images_per_second": "images per second",
    "seconds": "seconds of training",
}
"""Figures of a run's last row that are shown at its end, in this order."""


@dataclass(frozen=True)
class Options:
    """Train a student of a flow: a network that draws its images in one or a few evaluations.

    Run the same command again to continue where it stopped.
    """

    checkpoint: tyro.conf.Positional[Path]
    """The teacher: a run's folder, a checkpoint, or a name on the Hub."""
    out: Annotated[Path, tyro.conf.arg(help_behavior_hint="")] = Path("runs/distil")
    """The student's run."""
    method: Literal["inverse", "matching"] | None = None
    """Short for --student.method."""
    coupling: Literal["flow", "independent"] | None = None
    """Short for --student.coupling."""
    preset: str | None = None
    """Preset with the settings to start from; by default those of the teacher's own training."""
    json: Path | None = None
    """Write the final figures to this file."""
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    student: StudentConfig = field(default_factory=StudentConfig)


def run(argv: list[str]) -> None:
    """Train, and show where it ended."""
    options = parse(Options, argv, "distil", _settings)
    from flowback.training import distil, start

    given: dict[str, Any] = {"method": options.method, "coupling": options.coupling}
    student = replace(options.student, **{name: value for name, value in given.items() if value is not None})
    base = _base(options)
    config = replace(base, data=options.data, train=options.train, student=student)
    result = distil(options.checkpoint, out=options.out, config=config)
    if start(config.train).is_main_process:
        show_run(result, result.config.student.method, SHOWN, options.out, options.json)
        say(f"Student: {options.out}   (flowback sample {options.out} --out samples --compare compare.png)")


def _base(options: Any) -> RunConfig:
    """The settings to start from."""
    from flowback.model import Flow
    from flowback.presets import get_preset
    from flowback.training import student_config

    own = student_config(Flow.from_pretrained(options.checkpoint))
    if options.preset is None:
        return own
    preset = get_preset(options.preset).config
    if not preset.student.active:
        raise InputError(
            f"The preset {options.preset} trains a flow; flowback presets 'student*' lists students'."
        )
    return replace(own, data=preset.data, train=preset.train, student=preset.student)


def _settings(seen: Any) -> dict[str, Any]:
    """The settings of the preset, or those that follow from the teacher's training, by section."""
    base = _base(seen)
    return {name: getattr(base, name) for name in ("data", "train", "student")}
