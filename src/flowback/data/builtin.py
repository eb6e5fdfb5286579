"""Data sets known by name: scikit-learn's digits, and torchvision's MNIST, CIFAR-10/100 and FakeData."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from flowback.config import DataConfig
from flowback.data.image_set import MemoryImages
from flowback.data.pixels import fit
from flowback.errors import InputError
from flowback.files import cache_folder

__all__ = ["DIGITS_SEED", "Pictures", "digits", "pictures", "torchvision_images"]

DIGITS_SEED = 0
"""Seed of the digits' stratified split: 1,437 images for training, 360 for the test."""


_FAKE = {"train": 1024, "test": 256}


class Pictures(NamedTuple):
    """Images as the set has them, not yet brought to a size."""

    images: Sequence[Image.Image]
    targets: Sequence[int]
    classes: tuple[str, ...]


def digits(image_size: int, channels: int, split: Literal["train", "test"]) -> MemoryImages:
    """scikit-learn's 1,797 real handwritten digits, 8x8 with values 0 ... 16, here 0 ... 255.

    The split is fixed: 80 % for training, 20 % for the test, with the same share of each class. At another
    size than 8 the images are resized.
    """
    return _fitted(f"digits-{split}", _digits(split), image_size, channels)


def torchvision_images(
    data: DataConfig, image_size: int, channels: int, split: Literal["train", "test"]
) -> MemoryImages:
    """One of torchvision's sets, from ``data.path`` or the user's cache folder, downloaded if asked for.

    Raises:
        InputError: the files are not there, or cannot be downloaded.
    """
    return _fitted(f"{data.name}-{split}", pictures(data, image_size, channels, split), image_size, channels)


def pictures(data: DataConfig, image_size: int, channels: int, split: Literal["train", "test"]) -> Pictures:
    """The images of a set known by name; FakeData is made at the asked size, the others keep theirs.

    Raises:
        InputError: the files are not there, or cannot be downloaded.
    """
    if data.name == "digits":
        return _digits(split)
    import torchvision.datasets as sets

    if data.name == "fake":
        # Every image has its own seed; the test images are other ones than those of training.
        fake = sets.FakeData(
            _FAKE[split],
            (channels, image_size, image_size),
            10,
            random_offset=0 if split == "train" else _FAKE["train"],
        )
        images, targets = zip(*(fake[index] for index in range(len(fake))), strict=True)
        return Pictures(images, targets, tuple(map(str, range(10))))
    kind = {"mnist": sets.MNIST, "cifar10": sets.CIFAR10, "cifar100": sets.CIFAR100}[data.name]
    root = data.path or cache_folder()
    try:
        found = kind(str(root), train=split == "train", download=data.download)
    except (RuntimeError, OSError) as error:
        if data.download:
            raise InputError(
                f"{data.name} could not be downloaded to {root} ({error}); put torchvision's files there."
            ) from None
        raise InputError(
            f"{data.name} is not in {root}; give --data.path, or fetch it with --data.download."
        ) from None
    images = tuple(Image.fromarray(np.asarray(image)) for image in found.data)
    return Pictures(images, [int(target) for target in found.targets], tuple(found.classes))


def _digits(split: Literal["train", "test"]) -> Pictures:
    from sklearn.datasets import load_digits  # slow to import: only where the set is wanted
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(
        np.arange(len(data.target)), test_size=0.2, stratify=data.target, random_state=DIGITS_SEED
    )
    chosen = parts[0 if split == "train" else 1]
    pixels = np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    return Pictures(images, data.target[chosen].tolist(), tuple(map(str, range(10))))


def _fitted(name: str, found: Pictures, size: int, channels: int) -> MemoryImages:
    return MemoryImages(
        name=name,
        classes=found.classes,
        labels=torch.as_tensor(found.targets, dtype=torch.int64),
        pixels=torch.from_numpy(np.stack([fit(image, size, channels) for image in found.images])),
    )
