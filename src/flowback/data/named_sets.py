"""Data sets known by name: digits, MNIST and its like, CIFAR, emoji, FakeData, and what users register."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from flowback.config import DataConfig
from flowback.data.emoji import read_emoji
from flowback.data.image_set import ImageSet, MemoryImages, numbered
from flowback.data.mnist import MNIST_LIKE, downloads, read_mnist_like
from flowback.data.pixels import fit
from flowback.errors import InputError, nearest

__all__ = ["DIGITS_SEED", "Pictures", "dataset_names", "load_named", "pictures", "register_dataset"]

DIGITS_SEED = 0
"""Seed of the digits' stratified split: 1,437 images for training, 360 for the test."""


_FAKE = {"train": 1024, "test": 256}


class Pictures(NamedTuple):
    """Images as the set has them, not yet brought to a size."""

    images: Sequence[Image.Image]
    targets: Sequence[int] | None
    """Class of each image; None for unconditional."""
    classes: tuple[str, ...]


Split = Literal["train", "test"]
Loader = Callable[[DataConfig, int, int, Split], Pictures | ImageSet]
"""(what is asked for, image size, channels, split) to the images; the size is for sets that make them."""
_Function = TypeVar("_Function", bound=Callable[..., Any])


def dataset_names() -> tuple[str, ...]:
    """Names that ``DataConfig.name`` takes, beside `folder` and `prepared`.

    Example:
        >>> "digits" in dataset_names(), "fashion-mnist" in dataset_names()
        (True, True)
    """
    return tuple(sorted(_LOADERS))


def register_dataset(name: str) -> Callable[[_Function], _Function]:
    """Register a function as the data set ``name``, for ``DataConfig(name)``, ``--data.name`` and `prepare`.

    The function is called as ``function(split, image_size, channels, path)`` with ``split`` "train" or "test"
    and ``path`` the value of ``--data.path``. It gives an :class:`~flowback.data.image_set.ImageSet` of that
    size, or ``(images, labels, classes)``: images (n, c, h, w) in uint8 with 1 or 3 channels and of any size,
    which are resized and cropped to ``image_size``; ids of classes or None; and names of classes, or () for
    their numbers. Registering a name again replaces its function.

    Raises:
        InputError: the name is one of flowback's own data sets.

    Example:
        >>> import flowback, torch
        >>> @flowback.register_dataset("stripes")
        ... def stripes(split, image_size, channels, path):
        ...     images = torch.zeros(8, channels, image_size, image_size, dtype=torch.uint8)
        ...     images[4:, :, ::2] = 255
        ...     return images, [0] * 4 + [1] * 4, ("black", "striped")
        >>> images = flowback.load_images(flowback.DataConfig("stripes"), image_size=8, channels=1)
        >>> len(images), images.classes
        (8, ('black', 'striped'))
    """
    if name in _OWN or name in ("folder", "prepared", "none"):
        raise InputError(f"register_dataset: {name!r} is a data set of flowback's own; choose another name.")

    def register(function: _Function) -> _Function:
        def load(data: DataConfig, image_size: int, channels: int, split: Split) -> Pictures | ImageSet:
            images = function(split, image_size, channels, data.path)
            if not isinstance(images, tuple):
                _check_size(name, images, image_size, channels)
                return images
            return _pictures_of(name, *images)

        _LOADERS[name] = load
        return function

    return register


def load_named(data: DataConfig, image_size: int, channels: int, split: Split) -> ImageSet:
    """The images of a set known by name, at the asked size.

    Raises:
        InputError: no such name, files that are not there or damaged, or images of another kind.
    """
    if data.name not in _LOADERS:
        known = {*_LOADERS, "folder", "prepared"}
        raise InputError(f"--data.name {data.name} is not known; {nearest(data.name, known)}")
    loaded = _LOADERS[data.name](data, image_size, channels, split)
    if not isinstance(loaded, Pictures):
        return loaded
    labels = None if loaded.targets is None else torch.as_tensor(loaded.targets, dtype=torch.int64)
    pixels = np.stack([fit(image, image_size, channels) for image in loaded.images])
    return MemoryImages(f"{data.name}-{split}", loaded.classes, labels, torch.from_numpy(pixels))


def pictures(data: DataConfig, image_size: int, channels: int, split: Split) -> Pictures:
    """The images of a set known by name, at the size that they have; sets that make them use the asked one.

    Raises:
        InputError: the files are not there, or cannot be downloaded.
    """
    loaded = _LOADERS[data.name](data, image_size, channels, split)
    if isinstance(loaded, Pictures):
        return loaded
    pixels = loaded.in_pixels.read(torch.arange(len(loaded)))
    labels = None if loaded.labels is None else loaded.labels.tolist()
    return _pictures_of(data.name, pixels, labels, loaded.classes)


def _pictures_of(name: str, images: Any, labels: Any, classes: Sequence[str]) -> Pictures:
    """Arrays that a registered function gave, checked."""
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not len(pixels):
        raise InputError(
            f"Data set {name}: images are {pixels.dtype} of the shape {pixels.shape}; "
            "give uint8 (n, 1 or 3, height, width)."
        )
    ids, names = numbered(f"Data set {name}", len(pixels), labels, classes)
    flat = pixels[:, 0] if pixels.shape[1] == 1 else pixels.transpose(0, 2, 3, 1)
    shown = [Image.fromarray(np.ascontiguousarray(image)) for image in flat]
    return Pictures(shown, None if ids is None else ids.tolist(), names)


def _check_size(name: str, images: ImageSet, image_size: int, channels: int) -> None:
    wanted = (channels, image_size, image_size)
    if not len(images):
        raise InputError(f"Data set {name} holds no images.")
    shape = tuple(images.read(torch.tensor([0])).shape[1:])
    if shape != wanted:
        raise InputError(f"Data set {name} gives images of the shape {shape}, but {wanted} is needed.")


def _digits(data: DataConfig, image_size: int, channels: int, split: Split) -> Pictures:
    """scikit-learn's 1,797 real handwritten digits, 8x8 with values 0 ... 16, here 0 ... 255.

    The split is fixed: 80 % for training, 20 % for the test, with the same share of each class.
    """
    del data, image_size, channels
    from sklearn.datasets import load_digits  # slow to import: only where the set is wanted
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=DIGITS_SEED
    )
    chosen = parts[0 if split == "train" else 1]
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    return Pictures(images, digits.target[chosen].tolist(), tuple(map(str, range(10))))


def _fake(data: DataConfig, image_size: int, channels: int, split: Split) -> Pictures:
    """torchvision's FakeData: every image has its own seed, and no test image is one of training."""
    del data
    from torchvision.datasets import FakeData

    first = 0 if split == "train" else _FAKE["train"]
    fake = FakeData(_FAKE[split], (channels, image_size, image_size), 10, random_offset=first)
    images, targets = zip(*(fake[index] for index in range(len(fake))), strict=True)
    return Pictures(images, targets, tuple(map(str, range(10))))


def _mnist_like(data: DataConfig, image_size: int, channels: int, split: Split) -> Pictures:
    del image_size, channels
    return Pictures(*read_mnist_like(data, split))


def _emoji(data: DataConfig, image_size: int, channels: int, split: Split) -> Pictures:
    del image_size, channels
    return Pictures(*read_emoji(data, split))


def _cifar(data: DataConfig, image_size: int, channels: int, split: Split) -> Pictures:
    """torchvision's CIFAR-10 or CIFAR-100, from ``data.path`` or the user's cache folder."""
    del image_size, channels
    from torchvision.datasets import CIFAR10, CIFAR100

    root: Path = data.path or downloads(data.name)
    kind = CIFAR10 if data.name == "cifar10" else CIFAR100
    try:
        dataset = kind(str(root), train=split == "train", download=data.download)
    except (RuntimeError, OSError) as error:
        if data.download:
            raise InputError(
                f"{data.name} could not be downloaded to {root} ({error}); put torchvision's files there."
            ) from None
        raise InputError(
            f"{data.name} is not in {root}; give --data.path, or fetch it with --data.download."
        ) from None
    images = tuple(Image.fromarray(np.asarray(image)) for image in dataset.data)
    return Pictures(images, [int(target) for target in dataset.targets], tuple(dataset.classes))


_LOADERS: dict[str, Loader] = {
    "digits": _digits,
    "fake": _fake,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "emoji": _emoji,
    **dict.fromkeys(MNIST_LIKE, _mnist_like),
}


_OWN = frozenset(_LOADERS)
"""The names that flowback brings along."""
