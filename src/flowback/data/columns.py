"""The files of a prepared split: what is stored of each image, in files that grow by rows."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowback.data.decode_pool import Settings
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError

__all__ = ["FILES", "Column", "Maker", "bytes_of_image", "derive", "open_columns", "settings_of"]

FILES = ("images.npy", "labels.npy", "ends.npy", "names.txt", "latents.npy", "features.npy")
"""All that a split's folder may hold when it is complete."""

HEADER = 128
"""Bytes of the header: NumPy pads it so that a growing number of rows never changes its length."""


class Column:
    """Rows of one dtype and shape in a file; `seal` brings a .npy file's header up to date.

    Args:
        path: the file; what it holds already is kept. Only one that ends in .npy has a header.
        dtype: of the rows.
        shape: of one row.
    """

    def __init__(self, path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = np.dtype(dtype), shape
        self.start = HEADER if path.suffix == ".npy" else 0
        self.row = self.dtype.itemsize * math.prod(shape)
        self.file = path.open("r+b" if path.exists() else "w+b")

    def holds(self, rows: int) -> bool:
        """Whether the file is long enough for so many rows."""
        return os.fstat(self.file.fileno()).st_size >= self.start + rows * self.row

    def keep(self, rows: int) -> None:
        """Cut the file to its first ``rows`` rows, and append after them."""
        self.file.truncate(self.start + rows * self.row)
        self.file.seek(0, os.SEEK_END)

    def append(self, rows: np.ndarray) -> None:
        """Write rows at the end."""
        assert rows.dtype == self.dtype
        assert rows.shape[1:] == self.shape
        self.file.write(np.ascontiguousarray(rows).data)

    def read(self, first: int, until: int) -> bytes:
        """The bytes of rows ``first`` ... ``until`` - 1; fewer if the file is shorter."""
        self.file.seek(self.start + first * self.row)
        return self.file.read((until - first) * self.row)

    def flush(self) -> None:
        """Bring what was appended to disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def seal(self, rows: int) -> None:
        """Write the header, which says ``rows``."""
        if self.start:
            self.file.seek(0)
            np.lib.format.write_array_header_1_0(
                self.file, {"descr": self.dtype.str, "fortran_order": False, "shape": (rows, *self.shape)}
            )
            assert self.file.tell() == HEADER
        self.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


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
    derived: dict[str, np.ndarray] = {}
    if not makers or not len(pixels):
        return derived
    images = to_unit_range(torch.from_numpy(pixels))
    for name, maker in makers.items():
        both = torch.stack([maker(images), maker(images.flip(3))], dim=1).half()
        if not bool(both.isfinite().all()):
            raise InputError(f"The {name} have values beyond half precision; use another VAE or encoder.")
        derived[name] = both.cpu().numpy()
    return derived
