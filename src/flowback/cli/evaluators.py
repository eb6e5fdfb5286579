"""What `train` and `demo` look at while a flow trains: likelihood, accuracy and pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flowback.classification import classify
from flowback.config import RunConfig
from flowback.data.codec import open_codec
from flowback.data.images import ImageSet
from flowback.flow import Flow
from flowback.flow.likelihood import nll_per_dim, to_unit_range
from flowback.flow.noise import add_noise
from flowback.sampling import sample
from flowback.sampling.output import grid, save_png
from flowback.training import Evaluator

__all__ = ["held_out_figures", "likelihood_evaluator", "picture_evaluator"]

CHUNK = 256
"""Images evaluated at once."""


def held_out_figures(flow: Flow, images: ImageSet, limit: int, exhaustive: bool = False) -> dict[str, float]:
    """Mean nll of the noised images given their labels, and the accuracy of training-free classification.

    Args:
        flow: in eval mode.
        images: the test set; noise is seeded by an image's index.
        limit: the first so many images.
        exhaustive: also classify with one pass for every class.

    Returns:
        ``nll`` in nats per dimension; ``top1_gradient`` and ``top1_exhaustive`` as shares, with classes.
    """
    count = min(limit, len(images))
    sums: dict[str, float] = {}
    for start in range(0, count, CHUNK):
        indices = torch.arange(start, min(start + CHUNK, count))
        pixels = to_unit_range(images.read(indices)).to(flow.device)
        seeds = indices.tolist()
        labels = (
            images.labels[indices].to(flow.device)
            if flow.config.num_classes and images.labels is not None
            else None
        )
        with torch.no_grad():
            log_prob = flow(add_noise(pixels, flow.config, seeds), labels).log_prob
        found = {"nll": float(nll_per_dim(log_prob, flow.config.dims).sum())}
        if labels is not None:
            for method in ("gradient", "exhaustive") if exhaustive else ("gradient",):
                scores = classify(flow, pixels, method=method, seeds=seeds)
                found[f"top1_{method}"] = float((scores.argmax(1) == labels).sum())
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / count for name, value in sums.items()}


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
