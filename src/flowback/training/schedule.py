"""Learning rate and weight averaging as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from flowback.config import TrainConfig

__all__ = ["average_decay", "learning_rate", "update_average"]


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from ``lr`` to ``min_lr`` at the last step (TARFlow's schedule).

    Args:
        config: the schedule.
        step: counted from 0.
    """
    warmup = min(config.warmup_steps, config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * done))


def average_decay(decay: float, step: int) -> float:
    """Decay of a moving average at a step; short at first, so that the initial weights are forgotten."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: Iterable[Tensor], weights: Iterable[Tensor], decay: float) -> None:
    """Set average ← decay · average + (1 − decay) · weights, in place."""
    torch._foreach_lerp_(list(average), list(weights), 1 - decay)
