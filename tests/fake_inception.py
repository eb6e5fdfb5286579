"""A stand-in for the Inception network: random projections of the pixels, quick and deterministic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowback.evaluation.inception import Inception, InceptionFeatures

__all__ = ["FakeInception"]


class FakeInception(Inception):
    pool_dim, spatial_dim = 12, 6

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "fake")
        generator = torch.Generator().manual_seed(0)
        self.maps = [torch.randn(64, width, generator=generator) / 4 for width in (12, 6, 9)]

    def forward(self, images: Tensor) -> InceptionFeatures:
        small = nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True) / 64 - 2, 8)
        return InceptionFeatures(*((small.flatten(1) @ m).relu() for m in self.maps))
