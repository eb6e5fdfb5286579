"""A set of images behind one protocol, whatever it comes from.

Pixels are uint8, (channels, size, size), as evaluation sees them: resized and cropped, never flipped.
Noise, mirror images and the [-1, 1] scale belong to whoever trains.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from flowback.config import DataConfig
from flowback.data.folder import load_folder
from flowback.data.latents import PreparedLatents, load_latents
from flowback.data.named import digits, torchvision_images
from flowback.data.prepared import is_prepared, load_prepared, read_summary
from flowback.errors import InputError

__all__ = ["ImageSet", "load_images", "pixels_of"]


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


def load_images(
    data: DataConfig, image_size: int, channels: int, split: Literal["train", "test"]
) -> ImageSet:
    """The training or test images that ``data`` names.

    Args:
        data: which images, and what to do with unreadable ones.
        image_size: height and width that they are brought to.
        channels: 1 for grey, 3 for RGB; the images are converted.
        split: part of the set.

    Raises:
        InputError: the images are not there or cannot be read.

    Example:
        >>> import torch
        >>> from flowback import DataConfig
        >>> images = load_images(DataConfig("digits"), image_size=8, channels=1, split="test")
        >>> len(images), images.read(torch.tensor([0, 5])).shape
        (360, torch.Size([2, 1, 8, 8]))
    """
    if data.name == "prepared" and data.path is None:
        raise InputError("The data set is a prepared one, but --data.path does not say which.")
    if data.path is not None and (data.name == "prepared" or is_prepared(data.path)):
        latent = read_summary(data.path)["settings"].get("latent") is not None
        return (load_latents if latent else load_prepared)(data.path, image_size, channels, split)
    if channels not in (1, 3):
        raise InputError(
            f"--model.channels {channels}: images have 1 (grey) or 3 (RGB) channels; "
            "for latents give --data.path a set that was prepared with --vae."
        )
    if data.name == "folder" or (data.name == "digits" and data.path is not None):
        return load_folder(data, image_size, channels, split)
    if data.name == "digits":
        return digits(image_size, channels, split)
    return torchvision_images(data, image_size, channels, split)


def pixels_of(images: ImageSet) -> ImageSet:
    """The images themselves, where ``images`` are latents of them: what encoders and references see."""
    return images.pixels if isinstance(images, PreparedLatents) else images
