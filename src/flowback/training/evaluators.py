"""What is looked at while a flow trains: likelihood, accuracy and pictures."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flowback.config import RunConfig
from flowback.data.image_set import ImageSet
from flowback.data.vae import open_codec
from flowback.evaluation.held_out import held_out_figures
from flowback.model import Flow
from flowback.sampling import sample
from flowback.sampling.image_files import grid, save_png
from flowback.training import Evaluator

__all__ = ["likelihood_evaluator", "picture_evaluator"]


def likelihood_evaluator(config: RunConfig, test: ImageSet) -> Evaluator:
    """Test nll and gradient accuracy every ``--train.eval-every`` steps."""

    def call(step: int, flow: Flow) -> dict[str, float | Tensor]:
        del step
        figures = held_out_figures(flow, test, config.train.eval_images)
        return {f"test_{name}": value for name, value in figures.items()}

    return Evaluator(config.train.eval_every, call)


def picture_evaluator(config: RunConfig, folder: Path) -> Evaluator:
    """A grid of samples every ``--train.sample-every`` steps of the same noise, as files and for trackers."""

    def call(step: int, flow: Flow) -> dict[str, float | Tensor]:
        classes = min(flow.config.num_classes or 0, 8)
        labels = [k for k in range(classes) for _ in range(8)] or None
        drawn = sample(flow, labels, seeds=range(8 * (classes or 8)))
        images = open_codec(config.codec, flow.device).decode(drawn)
        sheet = grid(images, columns=8)
        save_png(sheet, folder / f"step-{step:08d}.png")
        return {"samples": sheet}

    return Evaluator(config.train.sample_every, call)
