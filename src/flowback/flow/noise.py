"""The noise that a flow is trained on, drawn so that an image's noise depends on its own seed only.

A flow models noised images, p(x + σ·ε): on clean ones, which lie off the training distribution in every
direction that the noise filled, its densities are not those that it learned (TARFlow, arXiv 2412.06329,
Sec. 2.3). So whatever reads a likelihood noises first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.config import ModelConfig
from flowback.flow.likelihood import dequantise

__all__ = ["add_noise"]


def add_noise(
    images: Float[Tensor, "b c h w"], config: ModelConfig, seeds: Sequence[int], draw: int = 0
) -> Float[Tensor, "b c h w"]:
    """Images on [-1, 1] with the model's training noise: x + σ·N(0, 1), or uniform dequantisation.

    The noise is drawn on the CPU, so that the device changes nothing.

    Args:
        images: clean images.
        config: the model.
        seeds: one for each image, not negative.
        draw: number of the draw; each gives other noise for the same seeds.
    """
    kind = torch.rand if config.noise == "uniform" else torch.randn
    generator = torch.Generator()
    noise = torch.empty(images.shape)
    for row, seed in enumerate(seeds):
        # A stride above the size of any data set whose seeds count up from 0.
        generator.manual_seed((seed + draw * 1_000_000_007) % 2**63)
        noise[row] = kind(images.shape[1:], generator=generator)
    if config.noise == "uniform":
        return dequantise(images, noise.to(images))
    return images + config.noise_std * noise.to(images)
