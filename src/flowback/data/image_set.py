"""Sets of images: what all of them offer, sets in memory, parts of a set, and matching classes by name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from flowback.config import CodecConfig
from flowback.data.pixels import to_bytes, to_unit_range
from flowback.devices import send
from flowback.errors import InputError, nearest

__all__ = [
    "AnyImages",
    "FeatureSettings",
    "FeatureTable",
    "ImageSet",
    "MemoryImages",
    "PixelSet",
    "Subset",
    "as_image_set",
    "evenly",
    "image_set",
    "in_batches",
    "labelled",
    "match_classes",
    "numbered",
]


@dataclass(frozen=True)
class FeatureSettings:
    """What decides the features of a prepared set, beside its images."""

    encoder: str
    """Name, as `--alignment.encoder` takes it."""
    file: str | None
    """SHA-256 of the file of weights that was given; None: the weights that the name stands for."""
    fingerprint: str
    """Hash of the weights and of the way of feeding."""
    grid: int
    """Patches along one side."""
    input_size: int
    """Side of the encoder's input, in pixels."""
    width: int
    """Of one feature."""

    @property
    def shape(self) -> tuple[int, int]:
        """Patches and width."""
        return self.grid**2, self.width


@dataclass(frozen=True)
class FeatureTable:
    """Patch features of every image of a set, and of its mirror image if there are two mirrors."""

    path: Path
    values: Float[Tensor, "n f m c"]
    """(images, mirrors, patches, width), mapped; mirror 1 is the mirrored image."""
    settings: FeatureSettings | None = None
    """What made them; None where the file's name says it."""

    def rows(self, indices: Int[Tensor, " b"], flipped: Bool[Tensor, " b"]) -> Float[Tensor, "b m c"]:
        """Features of the images at ``indices``, of the mirror image where ``flipped``; all on the CPU.

        Raises:
            ValueError: a mirror image is asked for, and the table has none.
        """
        mirrors = self.values.shape[1]
        if mirrors == 1 and bool(flipped.any()):
            raise ValueError(f"{self.path} holds no features of mirror images.")
        return self.values.flatten(0, 1).index_select(0, mirrors * indices + flipped)


@runtime_checkable
class ImageSet(Protocol):
    """Images of one size, read by index; pixels, or latents of images.

    For a set of your own, derive from :class:`PixelSet`, which provides the second half, or call
    :func:`image_set`.
    """

    @property
    def name(self) -> str:
        """Name of the set and the split."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their ids; empty for unconditional."""
        ...

    @property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image; None for unconditional."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash that changes with the images, their order or their size: the key of caches."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]:
        """What the flow models of the images at ``indices``, to measure it: pixels, or means of latents."""
        ...

    def file_name(self, index: int) -> str:
        """The image's file, or its number in a set without files."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that were left out because they cannot be read, with the reason."""
        ...

    @property
    def in_pixels(self) -> ImageSet:
        """The images themselves, which encoders and references see; a set of pixels is its own."""
        ...

    @property
    def codec(self) -> CodecConfig:
        """The VAE whose latents these are; ``codec.vae`` is None for pixels."""
        ...

    @property
    def feature_table(self) -> FeatureTable | None:
        """An encoder's features that were stored with the images; None: there are none."""
        ...

    def read_training(self, indices: Int[Tensor, " b"]) -> Tensor:
        """What :meth:`draw` needs of these images; called in the processes that read."""
        ...

    def draw(
        self, stored: Tensor, flipped: Bool[Tensor, " b"], noise: Callable[[], Tensor]
    ) -> Float[Tensor, "b c h w"]:
        """Training images on the device of ``flipped``, without the flow's noise.

        Args:
            stored: from :meth:`read_training`.
            flipped: which are mirrored.
            noise: gives standard normal values (b, c, h, w); called only by a set that draws at random.
        """
        ...


_Own = TypeVar("_Own")


class PixelSet:
    """Base class for sets of pixels, which have neither latents nor stored features.

    A subclass provides ``name``, ``classes``, ``labels``, ``fingerprint``, ``__len__``, ``read`` and
    ``file_name`` of :class:`ImageSet`.
    """

    skipped: tuple[str, ...] = ()

    @property
    def in_pixels(self: _Own) -> _Own:
        """The set itself."""
        return self

    @property
    def codec(self) -> CodecConfig:
        """No VAE."""
        return CodecConfig()

    @property
    def feature_table(self) -> FeatureTable | None:
        """None."""
        return None

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """The images at ``indices``."""
        raise NotImplementedError

    def read_training(self, indices: Int[Tensor, " b"]) -> Tensor:
        """The images at ``indices``."""
        return self.read(indices)

    def draw(
        self, stored: Tensor, flipped: Bool[Tensor, " b"], noise: Callable[[], Tensor]
    ) -> Float[Tensor, "b c h w"]:
        """The images on [-1, 1], mirrored where ``flipped``; nothing is random about them."""
        del noise
        images = to_unit_range(send(stored, flipped.device))
        return torch.where(flipped[:, None, None, None], images.flip(3), images)


@dataclass(frozen=True)
class MemoryImages(PixelSet):
    """Images of one size as a uint8 tensor; see :class:`~flowback.data.image_set.ImageSet`."""

    name: str
    classes: tuple[str, ...]
    labels: Int64[Tensor, " n"] | None
    pixels: UInt8[Tensor, "n c h w"]
    files: tuple[str, ...] = ()
    """Name of each image; empty for a set without files, which numbers them."""
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """The images at ``indices``."""
        return self.pixels[indices]

    def file_name(self, index: int) -> str:
        """The image's file, relative to the set's folder; for a set without files, its name and number."""
        return self.files[index] if self.files else f"{self.name}-{index:06d}"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the pixels and their order."""
        digest = hashlib.blake2b(str(tuple(self.pixels.shape)).encode(), digest_size=16)
        digest.update(self.pixels.contiguous().numpy().data)
        return digest.hexdigest()


def image_set(
    images: Any,
    labels: Tensor | Sequence[int] | None = None,
    classes: Sequence[str] = (),
    *,
    name: str = "images",
) -> MemoryImages:
    """Your own images as a set for training and evaluation, held in memory in 8 bits.

    Args:
        images: a tensor or array (n, c, h, w), uint8, or floats on [-1, 1], which are rounded to 8 bits; or a
            PyTorch ``Dataset`` of images, or of pairs (image, label), whose images are of one size and are
            PIL images or such tensors (c, h, w).
        labels: class id of each image; None without classes, or where the ``Dataset`` brings them.
        classes: names of the classes, in the order of the ids; left out, the ``Dataset``'s own ``classes``
            or else the numbers.
        name: shown in tables and records.

    Raises:
        InputError: images of another kind or size, floats outside of [-1, 1], or labels that do not fit.

    Example:
        >>> images = image_set(torch.zeros(3, 1, 8, 8), labels=[0, 1, 1], classes=("cat", "dog"))
        >>> len(images), images.classes, images.labels.tolist()
        (3, ('cat', 'dog'), [0, 1, 1])
        >>> images.read(torch.tensor([0])).dtype
        torch.uint8
    """
    if isinstance(images, (Tensor, np.ndarray)):
        pixels = _eight_bits(name, torch.as_tensor(images))
    else:
        pixels, own = _read_dataset(name, images)
        labels = own if labels is None else labels
        classes = classes or tuple(map(str, getattr(images, "classes", ())))
    found, names = numbered(name, len(pixels), labels, classes)
    return MemoryImages(name, names, found, pixels)


AnyImages: TypeAlias = ImageSet | Tensor | Dataset[Any]
"""Images as functions take them: a set, or what :func:`image_set` makes one of."""


def as_image_set(images: AnyImages) -> ImageSet:
    """A set as it is; of a tensor or a PyTorch ``Dataset``, :func:`image_set`.

    Example:
        >>> as_image_set(torch.zeros(3, 1, 8, 8)).name
        'images'
    """
    return images if isinstance(images, ImageSet) else image_set(images)


def _eight_bits(name: str, images: Tensor) -> UInt8[Tensor, "n c h w"]:
    if images.ndim != 4 or not len(images):
        raise InputError(f"{name}: images have the shape {tuple(images.shape)}; give (n, channels, h, w).")
    if images.dtype == torch.uint8:
        return images.cpu()
    if not images.is_floating_point():
        raise InputError(f"{name}: images are {images.dtype}; give uint8, or floats on [-1, 1].")
    low, high = images.min().item(), images.max().item()
    if not -1 <= low <= high <= 1:
        raise InputError(f"{name}: float images reach from {low:g} to {high:g}; bring them to [-1, 1].")
    if low >= 0 and high > 0:
        raise InputError(
            f"{name}: no value of the float images is below 0, so they look like [0, 1]; give 2 * images - 1."
        )
    return to_bytes(images)


def _read_dataset(name: str, dataset: Any) -> tuple[UInt8[Tensor, "n c h w"], list[int] | None]:
    """All images of a PyTorch dataset, and their labels."""
    images: list[Tensor] = []
    labels: list[int] = []
    for index in range(len(dataset)):
        item = dataset[index]
        image, *label = item if isinstance(item, (tuple, list)) else (item,)
        if not isinstance(image, Tensor):
            array = np.array(image)
            image = torch.from_numpy(array if array.ndim == 2 else array.transpose(2, 0, 1))
            image = image[None] if image.ndim == 2 else image
        if images and image.shape != images[0].shape:
            raise InputError(
                f"{name}: image {index} is {tuple(image.shape)}, the first one {tuple(images[0].shape)}; "
                "resize and crop them to one size in the data set's transform."
            )
        images.append(image)
        labels += [int(label[0])] if label and label[0] is not None else []
    if not images:
        raise InputError(f"{name} holds no images.")
    if labels and len(labels) != len(images):
        raise InputError(f"{name}: {len(labels)} of the {len(images)} images have a label; give all or none.")
    return _eight_bits(name, torch.stack(images)), labels or None


def numbered(
    name: str, count: int, labels: Tensor | Sequence[int] | None, classes: Sequence[str]
) -> tuple[Int64[Tensor, " n"] | None, tuple[str, ...]]:
    """Labels as int64, and the names of the classes: their numbers if ``classes`` is empty.

    Raises:
        InputError: labels that are not those of ``count`` images, or not ids of ``classes``.
    """
    if labels is None:
        return None, ()
    ids = torch.as_tensor(labels)
    if ids.shape != (count,) or ids.is_floating_point():
        raise InputError(
            f"{name}: labels are {ids.dtype} of the shape {tuple(ids.shape)}; give {count} class ids."
        )
    ids = ids.to("cpu", torch.int64)
    low, high = (int(ids.min()), int(ids.max())) if count else (0, -1)
    names = tuple(classes) or tuple(map(str, range(high + 1)))
    if low < 0 or high >= len(names):
        raise InputError(
            f"{name}: labels go from {low} to {high}, but there are {len(names)} classes; ids count from 0."
        )
    return ids, names


@dataclass(frozen=True)
class _View:
    """A set that differs from ``whole`` in what its class says, and is the same otherwise."""

    whole: ImageSet

    @property
    def name(self) -> str:
        """Name of the whole set."""
        return self.whole.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the whole set."""
        return self.whole.classes

    @property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image."""
        return self.whole.labels

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that the whole set left out."""
        return self.whole.skipped

    @property
    def fingerprint(self) -> str:
        """Hash of the whole set."""
        return self.whole.fingerprint

    @property
    def codec(self) -> CodecConfig:
        """The whole set's."""
        return self.whole.codec

    @property
    def feature_table(self) -> FeatureTable | None:
        """The whole set's."""
        return self.whole.feature_table

    def __len__(self) -> int:
        return len(self.whole)

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]:
        """The images at ``indices``."""
        return self.whole.read(indices)

    def file_name(self, index: int) -> str:
        """The image's name in the whole set."""
        return self.whole.file_name(index)

    def read_training(self, indices: Int[Tensor, " b"]) -> Tensor:
        """What training draws from, at ``indices``."""
        return self.whole.read_training(indices)

    def draw(
        self, stored: Tensor, flipped: Bool[Tensor, " b"], noise: Callable[[], Tensor]
    ) -> Float[Tensor, "b c h w"]:
        """As the whole set draws."""
        return self.whole.draw(stored, flipped, noise)


@dataclass(frozen=True)
class Subset(_View):
    """Chosen images of a set, in a chosen order; see :class:`~flowback.data.image_set.ImageSet`."""

    chosen: Int64[Tensor, " n"]

    @property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image."""
        return None if self.whole.labels is None else self.whole.labels[self.chosen]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the whole set and of the choice."""
        digest = hashlib.blake2b(self.whole.fingerprint.encode(), digest_size=16)
        digest.update(self.chosen.numpy().tobytes())
        return digest.hexdigest()

    @property
    def in_pixels(self) -> Subset:
        """The same choice of the images themselves."""
        pixels = self.whole.in_pixels
        return self if pixels is self.whole else Subset(pixels, self.chosen)

    @property
    def feature_table(self) -> FeatureTable | None:
        """None: a table's rows are those of the whole set."""
        return None

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]:
        """The images at ``indices`` of the choice."""
        return self.whole.read(self.chosen[indices])

    def file_name(self, index: int) -> str:
        """The image's name in the whole set."""
        return self.whole.file_name(int(self.chosen[index]))

    def read_training(self, indices: Int[Tensor, " b"]) -> Tensor:
        """What training draws from, at ``indices`` of the choice."""
        return self.whole.read_training(self.chosen[indices])


@dataclass(frozen=True)
class _Relabelled(_View):
    """The same images with the class ids of a model."""

    names: tuple[str, ...]
    ids: Int64[Tensor, " n"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Classes of the model."""
        return self.names

    @property
    def labels(self) -> Int64[Tensor, " n"]:
        """The model's class of each image."""
        return self.ids

    @property
    def in_pixels(self) -> _Relabelled:
        """The images themselves, with the same ids."""
        pixels = self.whole.in_pixels
        return self if pixels is self.whole else _Relabelled(pixels, self.names, self.ids)


def match_classes(images: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    """``images`` with the class ids of a model, matched by name.

    The same names in another order, or only some of them, are relabelled. A set without labels, or a model
    whose class names are not known (``classes`` empty), leaves the images as they are.

    Args:
        images: any set.
        classes: the model's names, in the order of its ids.

    Returns:
        A set whose ``classes`` are the model's.

    Raises:
        InputError: the images have a class that the model does not know, or a name stands for two classes.

    Example:
        >>> images = image_set(torch.zeros(2, 1, 8, 8), labels=[0, 1], classes=("eel", "cat"))
        >>> match_classes(images, ("cat", "dog", "eel")).labels.tolist()
        [2, 0]
        >>> match_classes(images, ("cat", "dog"))
        Traceback (most recent call last):
        ...
        flowback.errors.InputError: images has 1 of 2 classes that the model does not know: eel ...
    """
    names_here, labels = images.classes, images.labels
    if labels is None or not classes or names_here == classes:
        return images
    unknown = [name for name in names_here if name not in set(classes)]
    if unknown:
        raise InputError(
            f"{images.name} has {len(unknown)} of {len(names_here)} classes that the model does not know: "
            f"{_first(unknown)} ({_closest(unknown, classes)}); give images of the model's classes."
        )
    for names in (names_here, classes):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise InputError(
                f"{images.name} and the model have different classes, and {_first(twice)} names two of them: "
                "they cannot be matched by name; give both the same names in the same order."
            )
    ids = torch.tensor([classes.index(name) for name in names_here])
    return _Relabelled(images, classes, ids[labels])


def _closest(unknown: Sequence[str], classes: tuple[str, ...]) -> str:
    """The model's names that may be meant; its first ones where none is close."""
    hints = [nearest(name, classes, only_close=True).removeprefix("; ") for name in unknown[:3]]
    close = next((hint for hint in hints if hint), "")
    return close or f"it knows {_first(classes)}"


def _first(names: Iterable[str], most: int = 5) -> str:
    """A few names, and the number of the others."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def evenly(total: int, limit: int | None = None, share: tuple[int, int] = (0, 1)) -> Int64[Tensor, " n"]:
    """Indices of ``limit`` images spread evenly over ``total``; all if there are fewer.

    Args:
        total: images of the set.
        limit: how many of them; None is all.
        share: (r, p) gives part r, from 0, of these indices in p parts.

    Example:
        >>> evenly(10, 4).tolist(), evenly(10, 4, (1, 3)).tolist()
        ([0, 2, 5, 7], [5])
    """
    count = total if limit is None else min(limit, total)
    return (torch.arange(count) * total // max(count, 1)).tensor_split(share[1])[share[0]]


def labelled(images: ImageSet, count: int) -> Bool[Tensor, " n"]:
    """True for the ``count`` images that keep their labels, spread evenly over each class.

    Raises:
        InputError: the set has no labels, or ``count`` leaves a class without any.

    Example:
        >>> images = image_set(torch.zeros(5, 1, 8, 8), labels=[0, 1, 0, 1, 1], classes=("cat", "dog"))
        >>> labelled(images, 3).tolist()
        [True, True, True, False, False]
    """
    labels, classes = images.labels, len(images.classes)
    if labels is None or count < classes:
        what = "has no labels" if labels is None else f"has {classes} classes, and each needs one"
        raise InputError(f"--data.labelled {count}: {images.name} {what}.")
    kept = torch.zeros(len(images), dtype=torch.bool)
    for k in range(classes):
        own = torch.nonzero(labels == k)[:, 0]
        kept[own[evenly(len(own), count // classes + (k < count % classes))]] = True
    return kept


def in_batches(indices: Int64[Tensor, " n"], size: int) -> tuple[Int64[Tensor, " _"], ...]:
    """``indices`` in batches of ``size``; of none, no batch."""
    return indices.split(size) if len(indices) else ()
