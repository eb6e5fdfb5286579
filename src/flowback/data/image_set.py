"""Sets of images: what all of them offer, a set in memory, and parts of a set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

__all__ = ["ImageSet", "MemoryImages", "Subset", "evenly", "in_batches", "match_classes"]


@runtime_checkable
class ImageSet(Protocol):
    """Images of one size, read by index."""

    @property
    def name(self) -> str:
        """Name of the set and the split."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for unconditional."""
        ...

    @property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image; None for unconditional."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that were left out because they cannot be read, with the reason."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash that changes with the images, their order or their size: the key of caches."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]:
        """The images at ``indices``; of latents, their means."""
        ...

    def file_name(self, index: int) -> str:
        """The image's file, or its number in a set without files."""
        ...


@dataclass(frozen=True)
class MemoryImages:
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


@dataclass(frozen=True)
class Subset:
    """Chosen images of a set, in a chosen order; see :class:`~flowback.data.image_set.ImageSet`."""

    whole: ImageSet
    chosen: Int64[Tensor, " n"]

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
        return None if self.whole.labels is None else self.whole.labels[self.chosen]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that the whole set left out."""
        return self.whole.skipped

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the whole set and of the choice."""
        digest = hashlib.blake2b(self.whole.fingerprint.encode(), digest_size=16)
        digest.update(self.chosen.numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """The images at ``indices`` of the choice."""
        return self.whole.read(self.chosen[indices])

    def file_name(self, index: int) -> str:
        """The image's name in the whole set."""
        return self.whole.file_name(int(self.chosen[index]))


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


def in_batches(indices: Int64[Tensor, " n"], size: int) -> tuple[Int64[Tensor, " _"], ...]:
    """``indices`` in batches of ``size``; of none, no batch."""
    return indices.split(size) if len(indices) else ()


def match_classes(images: ImageSet, classes: tuple[str, ...]) -> ImageSet:
    """TEMPORARY, until the data work lands."""
    from flowback.errors import InputError

    unknown = [name for name in images.classes if name not in classes]
    if unknown:
        raise InputError(f"{images.name} has classes that the model does not know: {', '.join(unknown)}.")
    if images.labels is None or images.classes == classes:
        return images
    ids = torch.tensor([classes.index(name) for name in images.classes])
    everything = torch.arange(len(images))
    return MemoryImages(images.name, classes, ids[images.labels], images.read(everything))
