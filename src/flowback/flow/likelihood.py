"""Prior, noise and units of likelihood, all in one place.

Images live on [-1, 1]. Log-probabilities are nats per image, summed over dimensions; "nll" is nats per
dimension; "bits per dim" refers to 8-bit pixel values 0 ... 255.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["bits_per_dim", "dequantise", "log_prior", "nll_per_dim", "to_unit_range"]

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


def to_unit_range(images: UInt8[Tensor, "*s"] | Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """8-bit values as floats on [-1, 1]; floats are latents, which have their scale already."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def dequantise(images: Float[Tensor, "*s"], noise: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Uniform dequantisation: images of 8-bit values on [-1, 1] to 2 · (value + noise) / 256 - 1.

    Args:
        images: on [-1, 1], each value one of the 256 levels.
        noise: uniform on [0, 1).
    """
    values = torch.round((images + 1) * 127.5)
    return 2 * (values + noise) / 256 - 1
