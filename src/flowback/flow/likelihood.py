"""Prior, training noise and units of likelihood, all in one place.

Images live on [-1, 1]. Log-probabilities are nats per image, summed over dimensions; "nll" is nats per
dimension; "bits per dim" refers to 8-bit pixel values 0 ... 255.

A flow models noised images, p(x + σ·ε). Clean images lie off the training distribution, in every direction
that the noise filled, and the flow has not learned their density (TARFlow, arXiv 2412.06329, Sec. 2.3). So
whatever reads a likelihood adds noise first, and an image's noise depends only on its own seed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.config import ModelConfig
from flowback.data.pixels import to_levels

__all__ = ["add_noise", "bits_per_dim", "dequantise", "log_prior", "nll_per_dim"]

Scalar = TypeVar("Scalar", float, Tensor)


def log_prior(z: Float[Tensor, "b n d"]) -> Float[Tensor, " b"]:
    """Log-density of the standard normal, in nats."""
    dims = z[0].numel()
    return -0.5 * z.square().sum(dim=(1, 2)) - 0.5 * dims * math.log(2 * math.pi)


def nll_per_dim(log_prob: Scalar, dims: int) -> Scalar:
    """Negative log-likelihood in nats per dimension, on the [-1, 1] scale."""
    return -log_prob / dims


def bits_per_dim(log_prob: Scalar, dims: int) -> Scalar:
    """Bits per dimension of 8-bit images, from the log-density of the dequantised image on [-1, 1].

    :func:`dequantise` maps a bin of width 1 to one of width 2/256, hence log2(128) bits a dimension.
    """
    return nll_per_dim(log_prob, dims) / math.log(2) + math.log2(128)


def dequantise(images: Float[Tensor, "*s"], noise: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Uniform dequantisation: images of 8-bit values on [-1, 1] to 2 · (value + noise) / 256 - 1.

    Args:
        images: on [-1, 1], each value one of the 256 levels.
        noise: uniform on [0, 1).
    """
    values = torch.round(to_levels(images))
    return 2 * (values + noise) / 256 - 1


def add_noise(
    images: Float[Tensor, "b c h w"],
    config: ModelConfig,
    seeds: Sequence[int],
    draw: int = 0,
    levels: Float[Tensor, " b"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Images on [-1, 1] with the model's training noise: x + σ·N(0, 1), or uniform dequantisation.

    The noise is drawn on the CPU, so it is the same on every device.

    Args:
        images: clean images.
        config: the model.
        seeds: one for each image, not negative.
        draw: number of the draw; each gives other noise for the same seeds.
        levels: σ of each image, for a model with a range.
    """
    kind = torch.rand if config.noise == "uniform" else torch.randn
    generator = torch.Generator()
    noise = torch.empty(images.shape)
    for row, seed in enumerate(seeds):
        # A stride above the size of any data set whose seeds count up from 0.
        generator.manual_seed((operator.index(seed) + draw * 1_000_000_007) % 2**63)
        noise[row] = kind(images.shape[1:], generator=generator)
    if config.noise == "uniform":
        return dequantise(images, noise.to(images))
    if config.noise == "range":
        assert levels is not None
        return images + levels[:, None, None, None] * noise.to(images)
    return images + config.noise_std * noise.to(images)
