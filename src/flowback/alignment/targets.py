"""What the flow's features are aligned with: the encoder's features of each batch."""

from __future__ import annotations

import filecmp
import logging
from pathlib import Path

import torch
from torch import Tensor

from flowback.alignment.encoders import Encoder, load_encoder, weights_hash
from flowback.alignment.features import cached_features
from flowback.config import AlignmentConfig, RunConfig
from flowback.data.features import FeatureTable
from flowback.data.images import ImageSet, load_images, pixels_of
from flowback.data.prepared import PreparedImages, load_prepared, read_summary
from flowback.data.subset import Subset
from flowback.errors import InputError

__all__ = ["CachedTargets", "ComputedTargets", "make_targets"]

logger = logging.getLogger(__name__)

CACHE_LIMIT = 4 * 2**30
"""Bytes up to which features are computed once and kept on disk; beyond it, at every step."""


class CachedTargets:
    """Features read from a table; called as :class:`flowback.training.Targets`."""

    originals = None

    def __init__(self, table: FeatureTable, dim: int) -> None:
        self.table, self.dim = table, dim

    def __call__(self, indices: Tensor, flipped: Tensor, seen: Tensor) -> Tensor:
        """Features of the images at ``indices``, mirrored where ``flipped``."""
        return self.table.rows(indices, flipped).to(seen.device, non_blocking=True).float()


class ComputedTargets:
    """Features computed at every step."""

    def __init__(self, encoder: Encoder, grid: int, originals: ImageSet | None = None) -> None:
        self.encoder, self.grid, self.dim, self.originals = encoder, grid, encoder.dim, originals

    def __call__(self, indices: Tensor, flipped: Tensor, seen: Tensor) -> Tensor:
        """Features of the images ``seen``."""
        del indices, flipped  # the images themselves are at hand
        return self.encoder.to(seen.device)(seen, self.grid)


def make_targets(config: RunConfig, images: ImageSet, cache: Path) -> CachedTargets | ComputedTargets | None:
    """The targets of a run, None without alignment: a table of features, or the encoder itself.

    The table is the one that `flowback prepare` wrote beside the images; else, for a set that fits, one that
    is computed first and kept in ``cache``.

    Args:
        config: the run.
        images: the training images.
        cache: folder of feature tables.
    """
    if not config.alignment.active:
        return None
    wanted, pixels = config.alignment, pixels_of(images)
    grid = wanted.grid or config.model.grid
    seen = pixels if wanted.originals_path is None else _same_images(wanted.originals_path, pixels)
    prepared = None if wanted.originals else _prepared(seen, wanted, grid)
    if prepared is not None:
        return CachedTargets(prepared, prepared.values.shape[-1])
    encoder = load_encoder(wanted.encoder, wanted.weights)
    if wanted.originals:
        seen = _originals(config, pixels, encoder.input_size(grid))
    originals = None if seen is images else seen
    copies = 2 if config.data.flip else 1
    if copies * len(images) * grid**2 * encoder.dim * 4 > CACHE_LIMIT:
        return ComputedTargets(encoder, grid, originals)
    table = cached_features(encoder, seen, grid, config.data.flip, cache)
    return CachedTargets(table, encoder.dim)


def _prepared(seen: ImageSet, wanted: AlignmentConfig, grid: int) -> FeatureTable | None:
    """The features that were prepared with the images, if they are those of the encoder and the grid."""
    if not isinstance(seen, PreparedImages) or seen.features is None:
        return None
    found = seen.features
    own = (found.encoder, found.grid, found.file)
    if own != (wanted.encoder, grid, weights_hash(wanted.weights)):
        logger.info(
            "%s was prepared with features of %s on a %dx%d grid%s, not what is asked for: the encoder runs.",
            *(seen.name, found.encoder, found.grid, found.grid),
            f" (weights with SHA-256 {found.file[:12]}...)" if found.file else "",
        )
        return None
    table = seen.feature_table
    logger.info("Features of %s are read from %s; the encoder is not loaded.", found.encoder, table.path)
    return table


def _same_images(path: Path, images: ImageSet) -> PreparedImages:
    """The training images of the prepared set ``path``, at its own size.

    Raises:
        InputError: they are not those of ``images``, in the same order.
    """
    settings = read_summary(path)["settings"]
    other = load_prepared(path, settings["image_size"], settings["channels"], "train")
    same = isinstance(images, PreparedImages) and filecmp.cmp(
        images.folder / "names.txt", other.folder / "names.txt", shallow=False
    )
    if not same:
        raise InputError(
            f"--alignment.originals-path {path} does not hold the images of {images.name} in the same order; "
            "prepare both from the same files with the same options but --image-size."
        )
    return other


def _originals(config: RunConfig, images: ImageSet, size: int) -> ImageSet:
    """The same images in the same order, made anew from their files at the encoder's input size.

    Raises:
        InputError: they come from a prepared set, or a file cannot be read.
    """
    if isinstance(images, PreparedImages):
        raise InputError(
            f"--alignment.originals needs the image files, and {images.name} is prepared; prepare them with "
            f"--image-size {size} into another folder, and give that as --alignment.originals-path."
        )
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
