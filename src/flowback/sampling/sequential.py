"""Exact inversion of a block, one token after another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.flow import affine
from flowback.sampling.decoder import Decoder

__all__ = ["sequential"]


def sequential(decoder: Decoder, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """x of z = f(x): each token from the prediction of those before it; both in the block's own order."""
    x = torch.empty_like(z)
    x[:, 0] = z[:, 0]
    for i in range(z.shape[1] - 1):
        shift, log_scale = decoder.step(x[:, i : i + 1], i)
        x[:, i + 1 : i + 2] = affine.inverse(z[:, i + 1 : i + 2], shift, log_scale)
    return x
