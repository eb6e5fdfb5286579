"""What the flow's features are aligned with: the encoder's features of each batch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flowback.alignment.encoders import Encoder, load_encoder
from flowback.alignment.features import FeatureTable, cached_features
from flowback.config import RunConfig
from flowback.data.images import ImageSet, load_images, pixels_of
from flowback.data.subset import Subset
from flowback.errors import InputError

__all__ = ["CachedTargets", "ComputedTargets", "make_targets"]

CACHE_LIMIT = 4 * 2**30
"""Bytes up to which features are computed once and kept on disk; beyond it, at every step."""


class CachedTargets:
    """Features read from a table; called as :class:`flowback.training.Targets`."""

    originals = None

    def __init__(self, table: FeatureTable, dim: int) -> None:
        self.table, self.dim = table, dim

    def __call__(self, indices: Tensor, flipped: Tensor, seen: Tensor) -> Tensor:
        """Features of the images at ``indices``, mirrored where ``flipped``."""
        return self.table.rows(indices, flipped.cpu()).to(seen.device, non_blocking=True)


class ComputedTargets:
    """Features computed at every step."""

    def __init__(self, encoder: Encoder, grid: int, originals: ImageSet | None = None) -> None:
        self.encoder, self.grid, self.dim, self.originals = encoder, grid, encoder.dim, originals

    def __call__(self, indices: Tensor, flipped: Tensor, seen: Tensor) -> Tensor:
        """Features of the images ``seen``."""
        del indices, flipped  # the images themselves are at hand
        return self.encoder.to(seen.device)(seen, self.grid)


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
    originals = None if pixels_of(images) is images else pixels_of(images)
    if config.alignment.originals:
        originals = _originals(config, images, encoder.input_size(grid))
    copies = 2 if config.data.flip else 1
    if copies * len(images) * grid**2 * encoder.dim * 4 > CACHE_LIMIT:
        return ComputedTargets(encoder, grid, originals)
    table = cached_features(encoder, originals or images, grid, config.data.flip, cache)
    return CachedTargets(table, encoder.dim)


def _originals(config: RunConfig, images: ImageSet, size: int) -> ImageSet:
    """The same images in the same order, made anew from their files at the encoder's input size."""
    whole = load_images(config.data, size, config.model.channels, "train")
    number = {whole.file_name(index): index for index in range(len(whole))}
    names = [images.file_name(index) for index in range(len(images))]
    missing = [name for name in names if name not in number]
    if missing:
        raise InputError(
            f"--alignment.originals: {len(missing)} of the {len(names)} training images cannot be read at "
            f"{size} x {size} pixels, first {missing[0]}; repair or remove them."
        )
    if len(whole) == len(names) and all(number[name] == index for index, name in enumerate(names)):
        return whole
    return Subset(whole, torch.tensor([number[name] for name in names]))
