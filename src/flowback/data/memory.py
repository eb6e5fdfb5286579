"""A set of images that lies in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Int, Int64, UInt8
from torch import Tensor

__all__ = ["MemoryImages"]


@dataclass(frozen=True)
class MemoryImages:
    """Images of one size as a uint8 tensor; see :class:`~flowback.data.images.ImageSet`."""

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
