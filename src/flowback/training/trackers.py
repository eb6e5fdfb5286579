"""Metrics on a screen: TensorBoard, W&B and trackio, through Accelerate. metrics.jsonl needs none of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from jaxtyping import UInt8
from torch import Tensor

from flowback.config import RunConfig, to_dict
from flowback.errors import InputError

__all__ = ["check_trackers", "open_trackers", "show", "tracker_settings"]

PROJECT = "flowback"


def check_trackers(config: RunConfig) -> None:
    """Refuse trackers whose package is missing.

    Raises:
        InputError: names the package.
    """
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"--train.trackers {name} needs a package: pip install flowback-nf[{name}].")


def tracker_settings(config: RunConfig, out: Path) -> dict[str, Any]:
    """Arguments of Accelerator."""
    settings = ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard"))
    return {"log_with": list(config.train.trackers) or None, "project_config": settings}


def open_trackers(accelerator: Accelerator, config: RunConfig, out: Path, identity: str, step: int) -> None:
    """Start the trackers, or go on with those of a stopped run.

    Rows after ``step``, which the run writes again: TensorBoard hides the old ones, the others keep them.

    Args:
        accelerator: made with :func:`tracker_settings`.
        config: the run, shown beside it.
        out: the run's folder.
        identity: the same for all parts of a run.
        step: the run goes on from here.
    """
    accelerator.init_trackers(
        PROJECT,
        init_kwargs={
            "tensorboard": {"purge_step": step + 1},
            "wandb": {"id": identity, "name": out.name, "resume": "allow", "dir": str(out)},
            "trackio": {"name": f"{out.name}-{identity}", "resume": "allow"},
        },
    )
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # which would make a run of its own of the settings
            tracker.store_init_configuration(to_dict(config))


def show(
    accelerator: Accelerator,
    row: Mapping[str, float | int],
    pictures: Mapping[str, UInt8[Tensor, "c h w"]],
    step: int,
) -> None:
    """Send a row and pictures to all trackers."""
    if row:
        accelerator.log(dict(row), step=step)
    for name, picture in pictures.items():
        channels_last = picture.expand(3, -1, -1).permute(1, 2, 0).numpy()
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: picture[None].numpy()}, step=step)
            elif tracker.name == "wandb":
                tracker.log_images({name: [channels_last]}, step=step)
            else:
                import trackio

                tracker.log({name: trackio.Image(channels_last)}, step=step)
