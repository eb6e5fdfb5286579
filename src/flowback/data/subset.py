"""Parts of a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from flowback.data.images import ImageSet

__all__ = ["Subset", "evenly", "in_batches"]


@dataclass(frozen=True)
class Subset:
    """Chosen images of a set, in a chosen order; see :class:`~flowback.data.images.ImageSet`."""

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
