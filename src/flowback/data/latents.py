"""Prepared latents: the posterior of every image and of its mirror image, beside the images themselves.

train/latents.npy      (images, 2 mirrors, 2 moments, channels, height, width), float16: mean and standard
                       deviation of z = (latent - shift) · scale, as the flow sees it
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from flowback.config import CodecConfig, from_dict
from flowback.data.prepared import AGAIN, PreparedImages, load_prepared, mapped, read_summary
from flowback.errors import InputError

__all__ = ["PreparedLatents", "load_latents", "sample_posterior"]


@dataclass(frozen=True)
class PreparedLatents:
    """Latents read through the memory map; see `flowback.data.images.ImageSet`."""

    pixels: PreparedImages
    """The images, for encoders and references."""
    shape: tuple[int, int, int]
    """Channels, height and width of a latent."""
    codec: CodecConfig
    """The VAE that made them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedLatents, (self.pixels, self.shape, self.codec)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def name(self) -> str:
        """Name of the set and the split."""
        return self.pixels.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.pixels.classes

    @property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image."""
        return self.pixels.labels

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that were left out."""
        return self.pixels.skipped

    @property
    def fingerprint(self) -> str:
        """Hash of all that is stored of the images."""
        return self.pixels.fingerprint

    def file_name(self, index: int) -> str:
        """The image's file, relative to the source."""
        return self.pixels.file_name(index)

    @property
    def file(self) -> Path:
        """The file of the latents."""
        return self.pixels.folder / "latents.npy"

    @cached_property
    def moments(self) -> Float[Tensor, "n 2 2 c h w"]:
        """Mean and standard deviation of every image and its mirror image, mapped."""
        return mapped(self.file, np.float16, (len(self), 2, 2, *self.shape))

    def read(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Posterior means of the images at ``indices``: what evaluation sees."""
        return self._finite(self.moments[:, 0, 0].index_select(0, indices))

    def posterior(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b 2 2 c h w"]:
        """Both moments of these images and of their mirror images: what training samples from."""
        return self._finite(self.moments.index_select(0, indices))

    def _finite(self, values: Tensor) -> Tensor:
        if not bool(values.isfinite().all()):
            raise InputError(f"{self.file} holds values that are not finite; {AGAIN}")
        return values.float()


def load_latents(
    path: Path, image_size: int, channels: int, split: Literal["train", "test"]
) -> PreparedLatents:
    """A split of prepared latents.

    Args:
        path: the set's folder.
        image_size: height and width of the latents that the model wants.
        channels: their channels.
        split: part of the set.

    Raises:
        InputError: not complete, damaged, or latents of another size than the model's.
    """
    settings = read_summary(path)["settings"]
    shape = tuple(settings["latent"])
    if shape != (channels, image_size, image_size):
        raise InputError(
            f"{path} holds latents of {shape[0]} channels and {shape[1]}x{shape[2]}, the model takes "
            f"{channels} and {image_size}x{image_size}; choose --model.channels {shape[0]} and "
            f"--model.image-size {shape[1]}."
        )
    pixels = load_prepared(path, settings["image_size"], settings["channels"], split)
    latents = PreparedLatents(pixels, shape, from_dict(CodecConfig, settings["codec"]))
    _ = latents.moments  # a damaged file is known before it is used
    return latents


def sample_posterior(
    moments: Float[Tensor, "b 2 2 c h w"], flipped: Bool[Tensor, " b"], noise: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b c h w"]:
    """mean + standard deviation · noise, of the mirror image where ``flipped``."""
    own = torch.where(flipped[:, None, None, None, None], moments[:, 1], moments[:, 0])
    return own[:, 0] + own[:, 1] * noise
