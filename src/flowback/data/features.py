"""Encoder features of a set of images, read by index through the memory map, whoever wrote them.

A table is one .npy file, (images, mirrors, patches, width). `flowback prepare --encoder` writes it beside the
images it prepares, in half precision, for the training images alone:

train/features.npy     (images, 2 mirrors, grid², width), float16

For other sets, :mod:`flowback.alignment.features` keeps tables in a folder of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["FeatureSettings", "FeatureTable"]


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

    def rows(self, indices: Int[Tensor, " b"], flipped: Bool[Tensor, " b"]) -> Float[Tensor, "b m c"]:
        """Features of the images at ``indices``, of the mirror image where ``flipped``.

        Raises:
            ValueError: a mirror image is asked for, and the table has none.
        """
        mirrors = self.values.shape[1]
        if mirrors == 1 and bool(flipped.any()):
            raise ValueError(f"{self.path} holds no features of mirror images.")
        return self.values.flatten(0, 1).index_select(0, mirrors * indices.cpu() + flipped.cpu())
