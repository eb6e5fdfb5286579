"""What a split of a prepared set stores of each image, and in which files."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowback.data.column import Column
from flowback.data.decoding import Settings
from flowback.errors import InputError

__all__ = ["Maker", "bytes_of_image", "derive", "open_columns", "settings_of"]

Maker = Callable[[Tensor], Tensor]
"""Images (b, c, h, w) on [-1, 1] to what is stored of them, one row an image: a VAE, or an encoder."""


def settings_of(split: str, settings: Settings) -> Settings:
    """The settings of a split: nothing is ever aligned with features of the test images."""
    return settings if split == "train" else replace(settings, features=None)


def _columns(settings: Settings) -> dict[str, tuple[str, Any, tuple[int, ...]]]:
    """File, dtype and shape of one row; the rows of names are bytes, the others images."""
    size = settings.image_size
    columns: dict[str, tuple[str, Any, tuple[int, ...]]] = {
        "images": ("images.npy", np.uint8, (settings.channels, size, size)),
        "labels": ("labels.npy", np.int64, ()),
        "ends": ("ends.npy", np.int64, ()),
        "names": ("names.txt", np.uint8, ()),
    }
    if settings.latent is not None:
        columns["latents"] = ("latents.npy", np.float16, (2, 2, *settings.latent))
    if settings.features is not None:
        columns["features"] = ("features.npy", np.float16, (2, *settings.features.shape))
    return columns


def bytes_of_image(settings: Settings) -> int:
    """What one image takes, but for the length of its name."""
    return sum(np.dtype(dtype).itemsize * math.prod(row) for _, dtype, row in _columns(settings).values())


@contextlib.contextmanager
def open_columns(folder: Path, settings: Settings) -> Iterator[dict[str, Column]]:
    """The files of a split, to write or to check."""
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(contextlib.closing(Column(folder / file, dtype, row)))
            for name, (file, dtype, row) in _columns(settings).items()
        }


def derive(makers: Mapping[str, Maker], pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What each maker makes of images and of their mirror images, (b, 2 mirrors, ...), in half precision.

    Raises:
        InputError: values that half precision cannot hold.
    """
    made: dict[str, np.ndarray] = {}
    if not makers or not len(pixels):
        return made
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    for name, maker in makers.items():
        both = torch.stack([maker(images), maker(images.flip(3))], dim=1).half()
        if not bool(both.isfinite().all()):
            raise InputError(f"The {name} have values beyond half precision; take another VAE or encoder.")
        made[name] = both.cpu().numpy()
    return made
