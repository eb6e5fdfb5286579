"""The images that a configuration names."""

from __future__ import annotations

import logging
from typing import Literal

from flowback.checked import require_one_of
from flowback.config import DataConfig
from flowback.data.image_folder import load_folder
from flowback.data.image_set import ImageSet, Subset, evenly
from flowback.data.named_sets import load_named
from flowback.data.prepared import is_prepared, load_latents, load_prepared, read_summary
from flowback.errors import InputError

__all__ = ["UNNAMED", "load_images"]

UNNAMED = "none"
"""The name of data that were given in Python, or that nobody knows, as those of imported weights."""

logger = logging.getLogger(__name__)


def load_images(
    data: DataConfig, image_size: int, channels: int, split: Literal["train", "test"] = "train"
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
    require_one_of(split, Literal["train", "test"], "split")
    images = _load(data, image_size, channels, split)
    if split == "train":
        _show_order(images)
        if data.limit is not None and data.limit < len(images):
            images = Subset(images, evenly(len(images), data.limit))
    return images


def _show_order(images: ImageSet) -> None:
    """Say which class has which id where their names are numbers in another order, as 1, 10, 2."""
    names = images.classes
    if not all(name.isdecimal() for name in names) or sorted(names, key=int) == list(names):
        return
    shown = ", ".join(f"{index} is {name}" for index, name in enumerate(names[:12]))
    logger.info(
        "The classes of %s have ids in the order of their names as text: %s%s",
        *(images.name, shown, ", ..." if len(names) > 12 else "."),
    )


def _load(data: DataConfig, image_size: int, channels: int, split: Literal["train", "test"]) -> ImageSet:
    if data.name == "prepared" and data.path is None:
        raise InputError("--data.name prepared needs the folder of the prepared set; give it as --data.path.")
    if data.path is not None and (data.name == "prepared" or is_prepared(data.path)):
        latent = read_summary(data.path)["settings"].get("latent") is not None
        return (load_latents if latent else load_prepared)(data.path, image_size, channels, split)
    if channels not in (1, 3):
        raise InputError(
            f"--model.channels {channels}: images have 1 (grey) or 3 (RGB) channels; "
            "for latents give --data.path a set that was prepared with --vae."
        )
    if data.name == "folder" or (data.name in ("digits", UNNAMED) and data.path is not None):
        return load_folder(data, image_size, channels, split)
    if data.name == UNNAMED:
        raise InputError(
            "The model's settings name no data: its images were given in Python, or its weights imported; "
            "name the data with --data NAME or --data FOLDER."
        )
    return load_named(data, image_size, channels, split)
