"""What samples are compared with: ADM's .npz (images or statistics), a folder of images, or a data set."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from flowback.config import DataConfig
from flowback.data.image_folder import list_images
from flowback.data.image_set import ImageSet, PixelSet, Subset, evenly
from flowback.data.load import load_images
from flowback.data.pixels import UnreadableImageError, picture_size
from flowback.data.prepared import is_prepared, read_summary
from flowback.errors import InputError, shorten
from flowback.evaluation.metrics import Moments
from flowback.evaluation.npz import read_npz

__all__ = ["BadImages", "NpzImages", "Reference", "load_reference", "open_images"]


BadImages = Literal["refuse", "skip"]


@dataclass(frozen=True)
class NpzImages(PixelSet):
    """Images of an ADM .npz: ``arr_0``, uint8 (N, H, W, 3); see `flowback.data.image_set.ImageSet`.

    An uncompressed file is mapped, not read.
    """

    path: Path
    pixels: np.ndarray
    classes: tuple[str, ...] = ()
    labels: None = None
    skipped: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the images."""
        digest = hashlib.blake2b(str(self.pixels.shape).encode(), digest_size=16)
        for start in range(0, len(self.pixels), 1024):
            digest.update(self.pixels[start : start + 1024].tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """The images at ``indices``."""
        return torch.from_numpy(np.array(self.pixels[indices.numpy()])).permute(0, 3, 1, 2)

    def file_name(self, index: int) -> str:
        """The file's name and the image's number."""
        return f"{self.name}[{index}]"


@dataclass(frozen=True)
class Reference:
    """Images, or statistics, or both (ADM's files carry 10,000 images and the statistics of many more)."""

    name: str
    fingerprint: str
    images: ImageSet | None
    pool: Moments | None = None
    """Statistics of pool_3, for FID."""
    spatial: Moments | None = None
    """Statistics of the spatial features, for sFID."""

    @classmethod
    def of(cls, images: ImageSet) -> Reference:
        """A set of images; of latents, the images that they stand for."""
        images = images.in_pixels
        return cls(images.name, images.fingerprint, images)

    def limited(self, limit: int | None) -> Reference:
        """The same with so many of its images, spread evenly; statistics stay as they are."""
        if limit is None or self.images is None or limit >= len(self.images):
            return self
        images = Subset(self.images, evenly(len(self.images), limit))
        return replace(self, images=images, fingerprint=images.fingerprint)


def load_reference(path: Path, image_size: int, channels: int, bad_images: BadImages = "refuse") -> Reference:
    """The reference in a .npz file, a folder of images or a prepared set.

    A folder's images are resized and cropped to ``image_size``; those of a .npz or a prepared set must have
    it. ``bad_images`` says what to do with files that cannot be read, as in training.

    Raises:
        InputError: not there, pickled, of another size or without anything to compare with.
    """
    if path.suffix != ".npz":
        return Reference.of(_folder(path, image_size, channels, bad_images))
    arrays, names = read_npz(path, ("arr_0", *_STATISTICS))
    statistics = {key: _numbers(path, key, arrays[key]) for key in _STATISTICS if key in arrays}
    images = _npz_images(path, arrays) if "arr_0" in arrays else None
    if images is not None and images.pixels.shape[1:3] != (image_size, image_size):
        height, width = images.pixels.shape[1:3]
        raise InputError(
            f"{path} holds images of {height}x{width}, but the samples are {image_size}x{image_size}; "
            "use a reference of the samples' size."
        )
    if images is None and not {"mu", "sigma"} <= set(statistics):
        raise InputError(
            f"{path} holds neither images (arr_0) nor statistics (mu, sigma); it has {_listed(names)}."
        )
    digest = hashlib.blake2b((images.fingerprint if images else "").encode(), digest_size=16)
    for key, value in sorted(statistics.items()):
        digest.update(key.encode() + value.numpy().tobytes())
    pool = _moments(path, statistics, "mu", "sigma")
    return Reference(
        path.name, digest.hexdigest(), images, pool, _moments(path, statistics, "mu_s", "sigma_s")
    )


def open_images(path: Path, bad_images: BadImages = "refuse") -> ImageSet:
    """Samples in a .npz file, a folder or a prepared set, all of one size; grey pictures become RGB.

    Files that cannot be read are treated as ``bad_images`` says, and others skipped, as in training.

    Raises:
        InputError: not there, pickled, or of several sizes.
    """
    if path.suffix == ".npz":
        arrays, names = read_npz(path, ("arr_0",))
        if "arr_0" not in arrays:
            raise InputError(f"{path} holds no images (arr_0); it has {_listed(names)}.")
        return _npz_images(path, arrays)
    if not path.is_dir():
        raise InputError(f"{path} is neither a checkpoint, nor a folder of images, nor a .npz file.")
    if is_prepared(path):
        return _folder(path, read_summary(path)["settings"]["image_size"], 3, bad_images)
    sizes: dict[tuple[int, int], Path] = {}
    for name in list_images(path).files:
        file = path / name
        with contextlib.suppress(UnreadableImageError):  # refused or skipped when they are read
            sizes.setdefault(picture_size(file), file)
    if not sizes:
        raise InputError(f"None of the images in {path} can be read; repair them.")
    if len(sizes) > 1 or len({*next(iter(sizes))}) > 1:
        named = ", ".join(
            f"{file.relative_to(path)} {width}x{height}" for (width, height), file in list(sizes.items())[:3]
        )
        raise InputError(f"The images in {path} are not squares of one size ({named}); make them so.")
    return _folder(path, next(iter(sizes))[0], 3, bad_images)


def _folder(path: Path, image_size: int, channels: int, bad_images: BadImages) -> ImageSet:
    if not path.is_dir():
        raise InputError(f"{path} is neither a .npz file nor a folder of images.")
    if is_prepared(path):  # grey or not: networks see grey as three equal channels
        channels = read_summary(path)["settings"]["channels"]
    data = DataConfig("folder", path, holdout=0.0, bad_images=bad_images)
    return load_images(data, image_size, channels, "train").in_pixels


def _moments(path: Path, statistics: dict[str, Tensor], mean: str, covariance: str) -> Moments | None:
    """Statistics of an unknown number of images."""
    if mean not in statistics or covariance not in statistics:
        return None
    mu, sigma = statistics[mean], statistics[covariance]
    if (
        mu.ndim != 1
        or not len(mu)
        or sigma.shape != (len(mu), len(mu))
        or not (mu.isfinite().all() and sigma.isfinite().all())
        or not torch.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6)  # some files hold float32
        or bool((sigma.diagonal() < 0).any())
    ):
        raise InputError(
            f"{path}: {mean} and {covariance} are not a mean and its covariance; use another copy."
        )
    return Moments.from_covariance(2, mu, sigma)


_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


def _numbers(path: Path, key: str, values: np.ndarray) -> Tensor:
    if values.dtype.kind not in "fiu":
        raise InputError(f"{path}: {key} holds {values.dtype}, not numbers; use another copy.")
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _listed(names: list[str]) -> str:
    return shorten(", ".join(names)) or "nothing"


def _npz_images(path: Path, arrays: dict[str, np.ndarray]) -> NpzImages:
    pixels = arrays["arr_0"]
    if (
        pixels.dtype != np.uint8
        or pixels.ndim != 4
        or pixels.shape[3] != 3
        or pixels.shape[1] != pixels.shape[2]
    ):
        raise InputError(
            f"{path}: arr_0 is {pixels.dtype} of shape {pixels.shape}; ADM's files hold uint8 (N, H, H, 3)."
        )
    if not pixels.size:
        raise InputError(f"{path} holds no images: arr_0 has the shape {pixels.shape}.")
    return NpzImages(path, pixels)
