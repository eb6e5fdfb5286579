"""Noise levels of a flow that is trained over a range of them (iTARFlow, arXiv 2604.20041).

A level t is the standard deviation of the Gaussian noise on an image in [-1, 1]: x_t = x + t·ε. In training
each image has its own, and the likelihood of each counts with a weight w(t).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.config import ModelConfig, TrainConfig
from flowback.errors import InputError

__all__ = ["UserLevels", "checked_levels", "levels_at", "loss_weights"]

UserLevels = float | Tensor | None
"""Noise levels as users give them, not yet checked: one for all images, or a tensor of one an image."""

_ROUNDING = 1e-6
"""A level in fp32 may lie this share beyond an end of the range."""


def checked_levels(
    config: ModelConfig, noise: UserLevels, batch: int, like: Tensor
) -> Float[Tensor, " b"] | None:
    """The noise levels of a batch, checked; None for a flow that knows only one.

    Args:
        config: the flow.
        noise: from a user. A flow of one level takes None, or that level.
        batch: number of images.
        like: gives dtype and device.

    Raises:
        InputError: no level for a flow with a range, one outside of it, another than the flow's only one, or
            a wrong count.
    """
    if noise is None:
        if config.noise == "range":
            raise InputError(
                "This flow is trained over a range of noise levels: give the level of its images as noise, "
                f"from {config.noise_min:g} to {config.noise_max:g}."
            )
        return None
    values = torch.as_tensor(noise, dtype=like.dtype, device=like.device)
    if values.ndim and values.shape != (batch,):
        raise InputError(f"{values.numel()} noise levels for {batch} images; give one, or one per image.")
    if config.noise == "uniform":
        raise InputError(
            "This flow is trained on uniform dequantisation: it has no noise level; leave it out."
        )
    low, high = (config.noise_min, config.noise_max) if config.noise == "range" else (config.noise_std,) * 2
    outside = ~((values >= low * (1 - _ROUNDING)) & (values <= high * (1 + _ROUNDING)))  # NaN is outside
    if bool(outside.any()):
        level = float(values if not values.ndim else values[outside][0])
        if config.noise == "range":
            raise InputError(
                f"The noise level {level:g} is outside the range that the flow is trained on, "
                f"{low:g} to {high:g}; give one inside."
            )
        raise InputError(
            f"The noise level {level:g} is not that of this flow, which knows only {low:g}; leave it out, or "
            "train a flow with --model.noise range."
        )
    return values.expand(batch) if config.noise == "range" else None


def levels_at(shares: Float[Tensor, " b"], model: ModelConfig, train: TrainConfig) -> Float[Tensor, " b"]:
    """Noise levels of training images: quantiles of the distribution ``train.levels`` on the range.

    Args:
        shares: uniform on [0, 1).
        model: gives the range t0 ... t1.
        train: ``uniform`` in t; ``square``, in t²; ``log``, in log t; ``log-normal``: log t is normal with
            mean −1.2 and standard deviation 1, on condition that t lies in the range.
    """
    low, high = model.noise_min, model.noise_max
    if train.levels == "uniform":
        levels = low + shares * (high - low)
    elif train.levels == "square":
        levels = (low**2 + shares * (high**2 - low**2)).sqrt()
    elif train.levels == "log":
        levels = low * (shares * math.log(high / low)).exp()
    else:
        ends = torch.tensor([low, high], dtype=torch.float64, device=shares.device).log() + 1.2
        first, last = torch.special.ndtr(ends)
        levels = (torch.special.ndtri(first + shares.double() * (last - first)) - 1.2).exp().to(shares.dtype)
    return levels.clamp(low, high)


def loss_weights(
    levels: Float[Tensor, " b"], model: ModelConfig, train: TrainConfig
) -> Float[Tensor, " b"] | None:
    """w(t) of ``train.level_weight``; None: all count the same.

    ``level`` is t and ``square`` t². ``level-share`` and ``square-share`` divide them by t0 + t1 and by
    t0² + t1²: with ``train.levels`` uniform and square, their mean is then 1/2.
    """
    power = {"none": 0, "level": 1, "level-share": 1, "square": 2, "square-share": 2}[train.level_weight]
    if not power:
        return None
    weights = levels**power
    if train.level_weight.endswith("share"):
        weights = weights / (model.noise_min**power + model.noise_max**power)
    return weights
