"""What the flow's features are aligned with: an encoder's features, computed at every step or kept on disk.

A table of a whole data set is a :class:`~flowback.data.image_set.FeatureTable` in fp32; a .json beside it
says what it holds. The file's name has the hash of everything that the features depend on: the encoder's
weights and preprocessing, the images, the grid and whether it holds mirror images. So other weights, another
size or another data set never use this file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from flowback.alignment.encoders import Encoder, create_encoder, weights_hash
from flowback.config import AlignmentConfig, RunConfig
from flowback.data.image_set import FeatureTable, ImageSet, Subset
from flowback.data.load import load_images
from flowback.data.pixels import to_unit_range
from flowback.data.prepared import is_prepared, load_prepared, mapped, read_summary
from flowback.errors import InputError
from flowback.files import cache_folder, no_cache, write_json
from flowback.progress import track

__all__ = ["CachedTargets", "ComputedTargets", "cached_features", "make_targets"]

logger = logging.getLogger(__name__)

_VERSION = 2

_BATCH = 64

CACHE_LIMIT = 4 * 2**30
"""Bytes up to which features are computed once and kept on disk; beyond it, at every step."""


def cached_features(encoder: Encoder, images: ImageSet, grid: int, flip: bool, folder: Path) -> FeatureTable:
    """The features of ``images``, read from ``folder``, or computed and written there first.

    A damaged file is computed again.

    Args:
        encoder: on the device that computes.
        images: the data set.
        grid: patches along one side.
        flip: also those of the mirror images.
        folder: of all tables.

    Raises:
        InputError: the encoder fails on the images.
        OSError: the folder has no room, or cannot be written.
    """
    shape = [len(images), 2 if flip else 1, grid**2, encoder.dim]
    content = {
        "version": _VERSION,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "images": images.name,
        "images_fingerprint": images.fingerprint,
        "shape": shape,
    }
    key = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    path = folder / (re.sub(r"[^\w.-]+", "-", f"{images.name}-{encoder.name}-{grid}x{grid}-{key}") + ".npy")
    try:
        values = mapped(path, np.float32, tuple(shape))
    except InputError:  # none, or not a whole one
        _write(path, encoder, images, grid, shape)
        write_json(path.with_suffix(".json"), content)
        values = mapped(path, np.float32, tuple(shape))
    return FeatureTable(path, values)


def _write(path: Path, encoder: Encoder, images: ImageSet, grid: int, shape: list[int]) -> None:
    """Compute a table into a temporary file, which takes its place when it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    needed = 4 * np.prod(shape, dtype=np.int64)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"the features of {images.name} need {needed / 1e9:.1f} GB, {path.parent} has only "
            f"{free / 1e9:.1f}: make room, or choose a smaller --alignment.grid"
        )
    logger.info(
        "Encoding %s images%s of %s with %s on %s, once: %.3g GB in %s.",
        *(f"{shape[0]:,}", " and their mirror images" if shape[1] == 2 else "", images.name, encoder.name),
        *(encoder.mean.device, needed / 1e9, path),
    )
    temporary = path.with_name(f"{_prefix()}{os.getpid()}.{path.name}")
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=tuple(shape))
        batches = torch.arange(len(images)).split(_BATCH)
        for batch in track(batches, len(images), f"Features of {encoder.name}", step=_BATCH):
            clean = to_unit_range(images.read(batch)).to(encoder.mean.device)
            for mirror in range(shape[1]):
                features = encoder(clean.flip(-1) if mirror else clean, grid)
                array[batch[0] : batch[-1] + 1, mirror] = features.cpu().numpy()
        array.flush()
        del array
        with temporary.open("r+b") as file:  # Windows flushes what is open for writing
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _prefix() -> str:
    """Start of this machine's temporary file names; the process id follows, to find those of killed ones."""
    return f".{socket.gethostname()}."


def _remove_leftovers(folder: Path) -> None:
    """Remove the files of killed processes of this machine: their ids are free, or this process's own."""
    for file in folder.glob(f"{_prefix()}*.npy"):
        number = file.name.removeprefix(_prefix()).split(".")[0]
        if number.isdigit() and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            file.unlink(missing_ok=True)


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


def make_targets(
    config: RunConfig, images: ImageSet, cache: Path | None = None, device: torch.device | str = "cpu"
) -> CachedTargets | ComputedTargets | None:
    """The targets of a run, None without alignment: a table of features, or the encoder itself.

    The table is the one that `flowback prepare` wrote beside the images; else one that is computed first and
    kept in ``cache``. The encoder runs at every step if the table would be too large or cannot be kept, or if
    the run ends before it has seen every image once.

    Args:
        config: the run.
        images: the training images.
        cache: folder of feature tables; None: in the cache folder.
        device: where the encoder runs.
    """
    if not config.alignment.active:
        return None
    wanted, pixels = config.alignment, images.in_pixels
    grid = wanted.grid or config.model.grid
    seen = pixels if wanted.originals_path is None else _same_images(wanted.originals_path, pixels)
    prepared = None if wanted.originals else _prepared(seen, wanted, grid)
    if prepared is not None:
        return CachedTargets(prepared, prepared.values.shape[-1])
    encoder = create_encoder(wanted.encoder, wanted.weights).to(device)
    if wanted.originals:
        seen = _originals(config, pixels, encoder.input_size(grid))
    originals = None if seen is images else seen
    copies = 2 if config.data.flip else 1
    too_large = copies * len(images) * grid**2 * encoder.dim * 4 > CACHE_LIMIT
    if too_large or config.train.steps * config.train.batch_size < len(images):
        reason = "a table of features would be too large" if too_large else "the run does not see every image"
        logger.info("The encoder %s runs at every step: %s.", encoder.name, reason)
        return ComputedTargets(encoder, grid, originals)
    try:
        table = cached_features(encoder, seen, grid, config.data.flip, cache or cache_folder() / "features")
    except OSError as error:
        no_cache(error)
        return ComputedTargets(encoder, grid, originals)
    return CachedTargets(table, encoder.dim)


def _prepared(seen: ImageSet, wanted: AlignmentConfig, grid: int) -> FeatureTable | None:
    """The features that were prepared with the images, if they are those of the encoder and the grid."""
    table = seen.feature_table
    if table is None or table.settings is None:
        return None
    stored = table.settings
    key = (stored.encoder, stored.grid, stored.file)
    if key != (wanted.encoder, grid, weights_hash(wanted.weights)):
        logger.info(
            "%s was prepared with features of %s on a %dx%d grid%s, not those asked for: the encoder runs.",
            *(seen.name, stored.encoder, stored.grid, stored.grid),
            f" (weights with SHA-256 {stored.file[:12]}...)" if stored.file else "",
        )
        return None
    logger.info("Features of %s are read from %s; the encoder is not loaded.", stored.encoder, table.path)
    return table


def _same_images(path: Path, images: ImageSet) -> ImageSet:
    """The training images of the prepared set ``path``, at its own size.

    Raises:
        InputError: they are not those of ``images``, in the same order.
    """
    settings = read_summary(path)["settings"]
    other = load_prepared(path, settings["image_size"], settings["channels"], "train")
    if len(images) != len(other) or any(
        images.file_name(index) != other.file_name(index) for index in range(len(other))
    ):
        raise InputError(
            f"--alignment.originals-path {path} does not hold the images of {images.name} in the same order; "
            "prepare both from the same files with the same options except --image-size."
        )
    return other


def _originals(config: RunConfig, images: ImageSet, size: int) -> ImageSet:
    """The same images in the same order, made anew from their files at the encoder's input size.

    Raises:
        InputError: they come from a prepared set, or a file cannot be read.
    """
    if config.data.path is not None and is_prepared(config.data.path):
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
