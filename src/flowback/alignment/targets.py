"""What the flow's features are aligned with: the encoder's features of each batch."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from flowback.alignment.encoders import Encoder, load_encoder
from flowback.alignment.features import FeatureTable, cached_features
from flowback.config import RunConfig
from flowback.data.images import ImageSet

__all__ = ["CachedTargets", "ComputedTargets", "make_targets"]

CACHE_LIMIT = 4 * 2**30
"""Bytes up to which features are computed once and kept on disk; beyond it, at every step."""


class CachedTargets:
    """Features read from a table; called as :class:`flowback.training.Targets`."""

    def __init__(self, table: FeatureTable, dim: int) -> None:
        self.table, self.dim = table, dim

    def __call__(self, indices: Tensor, flipped: Tensor, clean: Tensor) -> Tensor:
        """Features of the images at ``indices``, mirrored where ``flipped``."""
        return self.table.rows(indices, flipped.cpu()).to(clean.device, non_blocking=True)


class ComputedTargets:
    """Features computed at every step."""

    def __init__(self, encoder: Encoder, grid: int) -> None:
        self.encoder, self.grid, self.dim = encoder, grid, encoder.dim

    def __call__(self, indices: Tensor, flipped: Tensor, clean: Tensor) -> Tensor:
        """Features of the images ``clean``."""
        del indices, flipped  # the images themselves are at hand
        return self.encoder.to(clean.device)(clean, self.grid)


def make_targets(config: RunConfig, images: ImageSet, cache: Path) -> CachedTargets | ComputedTargets | None:
    """The targets of a run: a table for a set that fits, else the encoder itself; None without alignment.

    Args:
        config: the run.
        images: the training images.
        cache: folder of feature tables.
    """
    if not config.alignment.active:
        return None
    encoder = load_encoder(config.alignment.encoder, config.alignment.weights)
    grid = config.alignment.grid or config.model.grid
    copies = 2 if config.data.flip else 1
    if copies * len(images) * grid**2 * encoder.dim * 4 > CACHE_LIMIT:
        return ComputedTargets(encoder, grid)
    return CachedTargets(cached_features(encoder, images, grid, config.data.flip, cache), encoder.dim)
