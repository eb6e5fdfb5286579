"""What is measured while a flow trains: likelihood, accuracy, samples, pictures, and hooks of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowback.config import RunConfig
from flowback.data.image_set import ImageSet
from flowback.data.vae import open_codec
from flowback.evaluation.held_out import held_out_figures
from flowback.evaluation.pipeline import evaluate
from flowback.model import Flow, Student
from flowback.sampling.image_files import grid, save_png
from flowback.task_config import EvaluateConfig

__all__ = ["Evaluator", "frechet_evaluator", "likelihood_evaluator", "picture_evaluator"]


@dataclass(frozen=True)
class Evaluator:
    """Something to measure while a flow trains.

    Example:
        >>> hook = Evaluator(1000, lambda step, flow: {"largest": float(flow.sample(0, [7]).max())})
    """

    every: int
    """Steps between two calls; it is also called after the last step."""
    call: Callable[[int, Any], Mapping[str, float | Tensor]]
    """Takes the step and the averaged flow (or student) in eval mode, in the main process. The numbers that
    it returns go into metrics.jsonl, and pictures, (c, h, w) of 8-bit values, to the trackers."""


def likelihood_evaluator(config: RunConfig, test: ImageSet) -> Evaluator:
    """Test nll and accuracy without a classifier every ``--train.eval-every`` steps."""

    def call(step: int, flow: Flow) -> dict[str, float | Tensor]:
        del step
        figures = held_out_figures(flow, test, config.train.eval_images, config.train.eval_exhaustive)
        return {f"test_{name}": value for name, value in figures.items()}

    return Evaluator(config.train.eval_every, call)


def frechet_evaluator(config: RunConfig, images: ImageSet) -> Evaluator:
    """Fréchet distance of samples to the training images every ``--train.frechet-every`` steps.

    That of :func:`flowback.evaluate`, without guidance: sample i has seed i and class i modulo their number.
    The reference's statistics are made at the first call, and kept on disk for later runs.
    """
    options = EvaluateConfig(
        samples=config.train.frechet_samples,
        likelihood=False,
        classification=False,
        protocol="none",
        reference_limit=None,  # as in the tables
    )

    def call(step: int, flow: Flow | Student) -> dict[str, float | Tensor]:
        del step
        figures = evaluate(flow, images, reference=images, config=options).figures
        return {"fd_efficientnet_lite0": figures["fd_efficientnet_lite0"]}

    return Evaluator(config.train.frechet_every, call)


def picture_evaluator(config: RunConfig, folder: Path) -> Evaluator:
    """Samples of the same noise every ``--train.sample-every`` steps, as a file and for the trackers."""

    def call(step: int, flow: Flow | Student) -> dict[str, float | Tensor]:
        classes = min(flow.config.num_classes or 0, 8)
        labels = [k for k in range(classes) for _ in range(8)] or None
        drawn = flow.sample(labels, seeds=range(8 * (classes or 8)))
        images = open_codec(config.codec, flow.device).decode(drawn)
        names = [flow.classes[k] if flow.classes else str(k) for k in range(classes)]
        sheet = grid(images, columns=8, names=names)
        save_png(sheet, folder / f"step-{step:08d}.png")
        return {"samples": sheet}

    return Evaluator(config.train.sample_every, call)
