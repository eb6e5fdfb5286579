"""What a flow says of one image: its likelihood, its class, its z, and the image decoded from that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.classification import Method, classify
from flowback.flow.likelihood import add_noise, bits_per_dim, nll_per_dim
from flowback.model import Flow

__all__ = ["DRAWS", "Reading", "read"]

DRAWS = 3
"""Draws of the noise that likelihood and scores are averaged over."""


@dataclass(frozen=True)
class Reading:
    """An image as the flow reads it."""

    bits_per_dim: float
    """Of the uniformly dequantised image, as ``flowback evaluate`` counts it."""
    nll: float
    """Nats per dimension of the image with the training noise."""
    scores: Float[Tensor, " k"] | None
    """Of each class; None for an unconditional flow."""
    noised: Float[Tensor, "1 c h w"]
    """The image with the training noise of seed 0: what is encoded."""
    z: Float[Tensor, "1 c h w"]
    """Its encoding, each token at its place."""
    again: Float[Tensor, "1 c h w"]
    """Decoded from z."""

    @property
    def error(self) -> float:
        """Largest difference between the noised image and the decoded one, on [-1, 1]."""
        return float((self.again - self.noised).abs().max())


@torch.no_grad()
def read(
    flow: Flow, image: Float[Tensor, "1 c h w"], label: int | None = None, method: Method = "gradient"
) -> Reading:
    """Read one image.

    Args:
        flow: the model.
        image: clean, on [-1, 1], each value one of the 256 levels.
        label: class under which it is encoded; None is unconditional.
        method: the rule of the class scores.
    """
    image = image.to(flow.device, flow.data_dtype)
    labels = None if label is None else [label]
    config = flow.config
    ranged = config.noise == "range"
    level = config.noise_level if ranged else None
    levels = flow.levels(level, 1)
    dequantised = noised = 0.0
    for draw in range(DRAWS):
        uniform = add_noise(image, replace(config, noise="uniform"), [0], draw)
        lowest = config.noise_min if ranged else None  # 8-bit values have the least noise that it knows
        dequantised += float(flow.log_prob(uniform, labels, noise=lowest)) / DRAWS
        noised += (
            float(flow.log_prob(add_noise(image, config, [0], draw, levels), labels, noise=level)) / DRAWS
        )
    encoded = flow.add_noise(image, [0], noise=level)
    z = flow(encoded, labels, noise=level).z
    return Reading(
        bits_per_dim(dequantised, config.dims),
        nll_per_dim(noised, config.dims),
        classify(flow, image, method, draws=DRAWS)[0].cpu() if config.num_classes else None,
        encoded.cpu(),
        flow.images(z).cpu(),
        flow.inverse(z, labels, noise=level).cpu(),
    )
