"""Encoder features of a whole data set, computed once and kept on disk.

A table is a :class:`~flowback.data.features.FeatureTable` in fp32; beside it a .json says what it holds. The
file's name carries the hash of everything the features depend on: the encoder's weights and way of feeding,
the images, the grid and whether mirror images are in it. Other weights, another size or another data set
hence look for another file, and never find this one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from flowback.alignment.encoders import Encoder
from flowback.data.features import FeatureTable
from flowback.data.images import ImageSet
from flowback.data.prepared import mapped
from flowback.errors import InputError
from flowback.flow.likelihood import to_unit_range
from flowback.progress import track
from flowback.record import write_json

__all__ = ["cached_features"]

_VERSION = 2
_BATCH = 64


def cached_features(encoder: Encoder, images: ImageSet, grid: int, flip: bool, folder: Path) -> FeatureTable:
    """The features of ``images``, read from ``folder``, or computed and written there first.

    A file that is damaged is made anew.

    Args:
        encoder: on the device that is to compute.
        images: the data set.
        grid: patches along one side.
        flip: mirror images, too.
        folder: of all tables.

    Raises:
        InputError: the disk has no room, or the encoder fails on the images.
    """
    shape = [len(images), 2 if flip else 1, grid**2, encoder.dim]
    content = {
        "version": _VERSION,
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "images": images.name,
        "images_fingerprint": images.fingerprint,
        "shape": shape,
    }
    key = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    path = folder / (re.sub(r"[^\w.-]+", "-", f"{images.name}-{encoder.name}-{grid}x{grid}-{key}") + ".npy")
    try:
        values = mapped(path, np.float32, tuple(shape))
    except InputError:  # none, or not a whole one
        _write(path, encoder, images, grid, shape)
        write_json(path.with_suffix(".json"), content)
        values = mapped(path, np.float32, tuple(shape))
    return FeatureTable(path, values)


def _write(path: Path, encoder: Encoder, images: ImageSet, grid: int, shape: list[int]) -> None:
    """Compute a table into a temporary file, which takes its place when it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = 4 * np.prod(shape, dtype=np.int64)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise InputError(
            f"The features of {images.name} need {needed / 1e9:.1f} GB, {path.parent} has {free / 1e9:.1f}: "
            "make room, or choose a smaller --alignment.grid."
        )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=tuple(shape))
        batches = torch.arange(len(images)).split(_BATCH)
        for batch in track(batches, len(images), f"Features of {encoder.name}", step=_BATCH):
            clean = to_unit_range(images.read(batch)).to(encoder.mean.device)
            for mirror in range(shape[1]):
                features = encoder(clean.flip(-1) if mirror else clean, grid)
                array[batch[0] : batch[-1] + 1, mirror] = features.cpu().numpy()
        array.flush()
        del array
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
