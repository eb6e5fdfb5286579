"""The embedding of a noise level, for flows that are trained over a range of levels (arXiv 2604.20041)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LevelEmbedding"]


class LevelEmbedding(nn.Module):
    """log t as sines and cosines, then a perceptron with the exact GELU: w → 4w → w.

    The frequencies are exp(−ln 10000 · k / (w/2)), k = 0 ... w/2 − 1; all sines come before all cosines.

    Args:
        width: w, even.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer(
            "frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half), persistent=False
        )
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, levels: Float[Tensor, " b"]) -> Float[Tensor, "b w"]:
        """Embeddings of noise levels, which are above 0."""
        angles = levels.log()[:, None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.down(F.gelu(self.up(waves.to(self.up.weight.dtype))))
