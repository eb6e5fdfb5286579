"""Exact inversion of a block, one token after another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.flow import affine
from flowback.sampling.decoder import Decoder

__all__ = ["sequential"]


@torch.no_grad()
def sequential(decoder: Decoder, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """x of z = f(x): each token from the prediction of those before it; both in the block's own order."""
    x = torch.empty_like(z)
    x[:, 0] = z[:, 0]
    known, noise = x.split(1, dim=1), z.split(1, dim=1)  # views of each token
    for i in range(z.shape[1] - 1):
        shift, log_scale = decoder.step(known[i], i)
        known[i + 1].copy_(affine.inverse(noise[i + 1], shift, log_scale))
    return x
