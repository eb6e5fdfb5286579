"""What the flow's features are aligned with: an encoder's features, computed at every step or kept on disk.

A table of a whole data set is a :class:`~flowback.data.image_set.FeatureTable` in fp32; a .json beside it
says what it holds. The file's name has the hash of everything that the features depend on: the encoder's
weights and preprocessing, the images, the grid and whether it holds mirror images. So other weights, another
size or another data set never use this file.

A table is written into a hidden file, with a note beside it of how many images it holds. What a stopped
process of this machine left is gone on with; temporary files of other tables are removed after a day.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from flowback.alignment.encoders import Encoder, create_encoder, weights_file_hash
from flowback.config import AlignmentConfig, RunConfig
from flowback.data.image_set import FeatureTable, ImageSet, Subset, evenly
from flowback.data.load import load_images
from flowback.data.pixels import to_unit_range
from flowback.data.prepared import is_prepared, load_prepared, mapped, read_summary
from flowback.devices import send
from flowback.errors import InputError
from flowback.files import cache_folder, no_cache, write_json
from flowback.progress import track
from flowback.reading import read_json

__all__ = [
    "CachedTargets",
    "CentredTargets",
    "ComputedTargets",
    "cached_features",
    "make_targets",
    "without_table",
]

logger = logging.getLogger(__name__)

_VERSION = 2

_BATCH = 64

_FLUSHED = 1024
"""Images after which a table that is being written is flushed to disk, and its note renewed."""

_STALE = 24 * 3600.0
"""Seconds after which nobody goes on with a temporary file: the process that writes it renews it often."""

CACHE_LIMIT = 4 * 2**30
"""Bytes up to which features are computed once and kept on disk; beyond it, at every step."""

MEANS_FROM = 20_000
"""Images, spread evenly over the set, whose mean is subtracted where no table of features is kept."""


def cached_features(encoder: Encoder, images: ImageSet, grid: int, flip: bool, folder: Path) -> FeatureTable:
    """The features of ``images``, read from ``folder``, or computed and written there first.

    A damaged file is computed again; a computation that was stopped goes on where it was.

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
    path, content = _place(encoder, images, grid, flip, folder)
    shape = content["shape"]
    table = _stored(path, shape)
    if table is None:
        _write(path, encoder, images, grid, shape)
        write_json(path.with_suffix(".json"), content)
        table = FeatureTable(path, mapped(path, np.float32, tuple(shape)))
    return table


def _place(
    encoder: Encoder, images: ImageSet, grid: int, flip: bool, folder: Path
) -> tuple[Path, dict[str, Any]]:
    """Where a table lies, and all that its features depend on."""
    content = _content(encoder, images, [len(images), 2 if flip else 1, grid**2, encoder.dim])
    key = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    name = re.sub(r"[^\w.-]+", "-", f"{images.name}-{encoder.name}-{grid}x{grid}-{key}")
    return folder / (name + ".npy"), content


def _stored(path: Path, shape: list[int]) -> FeatureTable | None:
    """The table at ``path``; None if there is none, or not a whole one."""
    try:
        return FeatureTable(path, mapped(path, np.float32, tuple(shape)))
    except InputError:
        return None


def _content(encoder: Encoder, images: ImageSet, shape: list[int]) -> dict[str, Any]:
    """All that the features depend on: another content is another table."""
    content: dict[str, Any] = {
        "version": _VERSION,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "images": images.name,
        "images_fingerprint": images.fingerprint,
        "shape": shape,
    }
    if encoder.mean.device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        content["convolutions"] = "tf32"  # PyTorch's default: ten bits of each factor
    return content


def _write(path: Path, encoder: Encoder, images: ImageSet, grid: int, shape: list[int]) -> None:
    """Compute a table into a temporary file, which takes its place when it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_prefix()}{os.getpid()}.{path.name}")
    note = temporary.with_suffix(".json")
    done = _taken_over(path, temporary, shape)
    _remove_stale(path.parent)
    needed = 4 * np.prod(shape, dtype=np.int64)
    free = shutil.disk_usage(path.parent).free
    if not done and needed > free:
        raise OSError(
            f"the features of {images.name} need {needed / 1e9:.1f} GB, {path.parent} has only "
            f"{free / 1e9:.1f}: make room, or choose a smaller --alignment.grid"
        )
    logger.info(
        "Encoding %s images%s of %s with %s on %s, once: %.3g GB in %s%s.",
        *(f"{shape[0]:,}", " and their mirror images" if shape[1] == 2 else "", images.name, encoder.name),
        *(encoder.mean.device, needed / 1e9, path, f"; {done:,} are there already" if done else ""),
    )
    try:
        mode = "r+" if done else "w+"
        array = np.lib.format.open_memmap(temporary, mode=mode, dtype=np.float32, shape=tuple(shape))
        batches, since = torch.arange(done, shape[0]).split(_BATCH), 0
        for batch in track(batches, shape[0] - done, f"Features of {encoder.name}", step=_BATCH):
            clean = to_unit_range(images.read(batch)).to(encoder.mean.device)
            first, end = int(batch[0]), int(batch[-1]) + 1
            for mirror in range(shape[1]):
                features = encoder(clean.flip(-1) if mirror else clean, grid)
                array[first:end, mirror] = features.cpu().numpy()
            since += len(batch)
            if since >= _FLUSHED:
                array.flush()
                write_json(note, {"images": end})
                since = 0
        array.flush()
        del array
        with temporary.open("r+b") as file:  # Windows flushes what is open for writing
            os.fsync(file.fileno())
        temporary.replace(path)
        note.unlink(missing_ok=True)
    except Exception:  # but not Ctrl-C, after which the same run goes on with it
        for left in (temporary, note):
            left.unlink(missing_ok=True)
        raise


def _prefix() -> str:
    """Start of this machine's temporary file names; the process id follows, to find those of killed ones."""
    return f".{socket.gethostname()}."


def _taken_over(path: Path, temporary: Path, shape: list[int]) -> int:
    """Make what a killed process of this machine left of this table this process's own; its images.

    Of two processes, the one whose renaming works has it.
    """
    for file in path.parent.glob(f"{glob.escape(_prefix())}*.{glob.escape(path.name)}"):
        number = file.name.removeprefix(_prefix()).split(".")[0]
        if not number.isdigit() or (int(number) != os.getpid() and psutil.pid_exists(int(number))):
            continue
        note = file.with_suffix(".json")
        try:
            done = read_json(note).get("images")
        except (OSError, ValueError):
            done = None
        with contextlib.suppress(OSError):
            file.replace(temporary)
            os.utime(temporary)  # in use from now on
            note.unlink(missing_ok=True)
            whole = _stored(temporary, shape) is not None
            if whole and isinstance(done, int) and 0 < done <= shape[0]:
                write_json(temporary.with_suffix(".json"), {"images": done})
                return done
            temporary.unlink(missing_ok=True)
    return 0


def _remove_stale(folder: Path) -> None:
    """Remove temporary files that nobody has written to for a day, of whatever table and machine."""
    for file in folder.glob(".*"):
        if file.suffix in (".npy", ".json"):
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < time.time() - _STALE:
                    file.unlink()


class CachedTargets:
    """Features read from a table; called as :class:`flowback.training.Targets`."""

    originals = None

    def __init__(self, table: FeatureTable, dim: int) -> None:
        self.table, self.dim = table, dim

    def __call__(self, indices: Tensor, flipped: Tensor, seen: Tensor) -> Tensor:
        """Features of the images at ``indices``, mirrored where ``flipped``."""
        return send(self.table.rows(indices, flipped), seen.device).float()


class ComputedTargets:
    """Features computed at every step."""

    def __init__(self, encoder: Encoder, grid: int, originals: ImageSet | None = None) -> None:
        self.encoder, self.grid, self.dim, self.originals = encoder, grid, encoder.dim, originals
        self._looked = False

    def __call__(self, indices: Tensor, flipped: Tensor, seen: Tensor) -> Tensor:
        """Features of the images ``seen``."""
        del indices, flipped  # the images themselves are at hand
        # To look waits for the device, so a GPU looks at the first batch only. Features that break later make
        # a step whose gradient is not finite, which never reaches the weights and is reported.
        check = seen.device.type == "cpu" or not self._looked
        self._looked = True
        return self.encoder.to(seen.device)(seen, self.grid, check)


class CentredTargets:
    """Features minus their mean over the training images, at each patch, or for each class and patch.

    Position and label alone, which the flow is told, explain most of an encoder's feature: the cosine of
    EfficientNet-Lite0's with such a mean is 0.79 on Fashion-MNIST. What is left differs from image to image.

    Args:
        targets: the features.
        images: the training images.
        by_class: one mean for each class; else one for all images.
        flip: mirror images have their own means.
        device: where the encoder runs.

    Raises:
        InputError: ``by_class``, and the images have no labels.
    """

    def __init__(
        self,
        targets: CachedTargets | ComputedTargets,
        images: ImageSet,
        by_class: bool,
        flip: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        if by_class and images.labels is None:
            raise InputError(
                f"--alignment.subtract class-place needs labels, which {images.name} does not have; "
                "take --alignment.subtract place."
            )
        self.targets, self.dim, self.originals = targets, targets.dim, targets.originals
        labels = images.labels if by_class else None
        self.groups = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        limit = None if isinstance(targets, CachedTargets) else MEANS_FROM
        numbers = evenly(len(images), limit)
        self.means = torch.stack(
            [self._means(images, numbers, mirror, device) for mirror in ((False, True) if flip else (False,))]
        )

    def _means(
        self, images: ImageSet, numbers: Int64[Tensor, " n"], mirror: bool, device: torch.device | str
    ) -> Float[Tensor, "k m f"]:
        """The mean of each group; of all images where a group has none among ``numbers``."""
        seen_by_encoder = self.originals or images.in_pixels
        groups = int(self.groups.max()) + 1
        sums, counts = None, torch.zeros(groups, dtype=torch.float64)
        what = "Means of the mirror images' features" if mirror else "Means of the features"
        for batch in track(numbers.split(_BATCH), len(numbers), what, step=_BATCH):
            seen = torch.empty(0)
            if isinstance(self.targets, ComputedTargets):
                seen = to_unit_range(seen_by_encoder.read(batch)).to(device)
            flipped = torch.full((len(batch),), mirror)
            features = self.targets(batch, flipped, seen.flip(-1) if mirror else seen).cpu().double()
            if sums is None:
                sums = torch.zeros(groups, *features.shape[1:], dtype=torch.float64)
            sums.index_add_(0, self.groups[batch], features)
            counts.index_add_(0, self.groups[batch], torch.ones(len(batch), dtype=torch.float64))
        assert sums is not None
        means = sums / counts[:, None, None]
        return torch.where(counts[:, None, None] > 0, means, sums.sum(0) / counts.sum()).float()

    def __call__(
        self, indices: Int64[Tensor, " b"], flipped: Bool[Tensor, " b"], seen: Float[Tensor, "b c p q"]
    ) -> Float[Tensor, "b m f"]:
        """Centred features of the images at ``indices``, mirrored where ``flipped``."""
        means = self.means[flipped.long().cpu(), self.groups[indices]]
        return self.targets(indices, flipped, seen) - send(means, seen.device)


def make_targets(
    config: RunConfig, images: ImageSet, cache: Path | None = None, device: torch.device | str = "cpu"
) -> CachedTargets | ComputedTargets | CentredTargets | None:
    """The targets of a run, None without alignment: a table of features, or the encoder itself.

    The table is the one that `flowback prepare` wrote beside the images; else one that is computed first and
    kept in ``cache``. The encoder runs at every step if the table would be too large or cannot be kept, or if
    the run aligns fewer images than a table has, mirror images counted; a table that is there is used anyway.

    Args:
        config: the run.
        images: the training images.
        cache: folder of feature tables; None: in the cache folder.
        device: where the encoder runs.
    """
    if not config.alignment.active:
        return None
    targets = _uncentred(config, images, cache, device)
    subtract = config.alignment.subtract
    if subtract == "nothing":
        return targets
    return CentredTargets(targets, images, subtract == "class-place", config.data.flip, device)


def _uncentred(
    config: RunConfig, images: ImageSet, cache: Path | None, device: torch.device | str
) -> CachedTargets | ComputedTargets:
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
    flip = config.data.flip
    with contextlib.suppress(OSError):  # without a home, there is no cache
        path, content = _place(encoder, seen, grid, flip, cache or cache_folder() / "features")
        table = _stored(path, content["shape"])
        if table is not None:
            return CachedTargets(table, encoder.dim)
    reason = without_table(config, len(images), encoder.dim)
    if reason is not None:
        logger.info("The encoder %s runs at every step: %s.", encoder.name, reason)
        return ComputedTargets(encoder, grid, originals)
    try:
        table = cached_features(encoder, seen, grid, flip, cache or cache_folder() / "features")
    except OSError as error:
        no_cache(error)
        return ComputedTargets(encoder, grid, originals)
    return CachedTargets(table, encoder.dim)


def without_table(config: RunConfig, count: int, dim: int) -> str | None:
    """Why the features of ``count`` images, ``dim`` wide, are computed step by step; None: they are kept."""
    rows, grid = (2 if config.data.flip else 1) * count, config.alignment.grid or config.model.grid
    if rows * grid**2 * dim * 4 > CACHE_LIMIT:
        return "a table of features would be too large"
    steps = min(config.train.steps, config.alignment.stop_at or config.train.steps)
    aligned = steps * config.train.batch_size
    return f"the run aligns {aligned:,} images, a table has {rows:,}" if aligned < rows else None


def _prepared(seen: ImageSet, wanted: AlignmentConfig, grid: int) -> FeatureTable | None:
    """The features that were prepared with the images, if they are those of the encoder and the grid."""
    table = seen.feature_table
    if table is None or table.settings is None:
        return None
    stored = table.settings
    key = (stored.encoder, stored.grid, stored.file)
    if key != (wanted.encoder, grid, weights_file_hash(wanted.weights)):
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
