"""MNIST and the sets made in its image: Fashion-MNIST, KMNIST and EMNIST, 28x28 grey, from their idx files.

An idx file is a magic number that says dtype and number of dimensions, the dimensions as big-endian integers,
and the values; it is read as it is, compressed by gzip or not. EMNIST is its `balanced` part: 47 classes of
2,400 + 400 images, letters that look alike in both cases taken as one. Its files store each character
transposed; here it stands upright.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from flowback.config import DataConfig
from flowback.errors import InputError
from flowback.files import cache_folder
from flowback.reading import open_regular

__all__ = ["MNIST_LIKE", "MnistLike", "downloads", "read_idx", "read_mnist_like"]

LIMIT = 1024 * 2**20
"""Bytes of an idx file, unpacked; EMNIST's largest has 814,255 images of 784, 609 MiB."""


DEBIAN = Path("/usr/share/datasets")
"""Where Debian's packages of data sets put their files."""


@dataclass(frozen=True)
class MnistLike:
    """Where a set's files lie and what its classes are called."""

    torchvision: str
    """Name of torchvision's class, and of the folder it downloads to."""
    classes: tuple[str, ...]
    package: str | None = None
    """Debian's package, named after its folder."""
    part: str = ""
    """What the files' names begin with, and torchvision's `split`."""
    tests: str = "t10k"
    """What the names of the test images' files begin with, after the part."""

    def files(self, split: Literal["train", "test"]) -> tuple[str, str]:
        """Names of the images' and the labels' file, without `.gz`."""
        prefix = (f"emnist-{self.part}-" if self.part else "") + ("train" if split == "train" else self.tests)
        return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


MNIST_LIKE = {
    "mnist": MnistLike(
        "MNIST",
        (
            "0 - zero",
            "1 - one",
            "2 - two",
            "3 - three",
            "4 - four",
            "5 - five",
            "6 - six",
            "7 - seven",
            "8 - eight",
            "9 - nine",
        ),
    ),
    "fashion-mnist": MnistLike(
        "FashionMNIST",
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        package="dataset-fashion-mnist",
    ),
    "kmnist": MnistLike("KMNIST", ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")),
    "emnist": MnistLike(
        "EMNIST", tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"), part="balanced", tests="test"
    ),
}
"""The sets by name; classes are named as torchvision names them."""


def read_mnist_like(
    data: DataConfig, split: Literal["train", "test"]
) -> tuple[list[Image.Image], list[int], tuple[str, ...]]:
    """Images, labels and class names of one of :data:`MNIST_LIKE`.

    The files are looked for in ``data.path`` itself and in torchvision's folders under it; without a path in
    Debian's folder and in the user's cache. ``data.download`` fetches what is not there.

    Raises:
        InputError: the files are not there, cannot be downloaded, or are damaged.
    """
    kind = MNIST_LIKE[data.name]
    root = data.path or downloads(data.name)
    raw = root / kind.torchvision / "raw"
    folders = [root, raw] if data.path else [DEBIAN / data.name, raw]
    files = _find(folders, kind.files(split))
    if files is None and data.download:
        _download(data.name, kind, root)
        files = _find([raw], kind.files(split))
    if files is None:
        where = f"install the Debian package {kind.package}, " if kind.package else ""
        raise InputError(
            f"{data.name} is not in {' or '.join(map(str, folders))}; {where}"
            "say where its idx files lie with --data.path, or fetch it with --data.download."
        )
    images, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    if len(images) != len(labels) or (len(labels) and labels.max() >= len(kind.classes)):
        raise InputError(
            f"{files[1]} does not hold the labels of {files[0]}: {len(labels)} labels up to "
            f"{labels.max(initial=0)}, {len(images)} images of {len(kind.classes)} classes; "
            "use another copy of both."
        )
    if kind.part:
        images = images.transpose(0, 2, 1)
    return [Image.fromarray(image) for image in images], labels.tolist(), kind.classes


def downloads(name: str) -> Path:
    """Where downloaded sets lie.

    Raises:
        InputError: there is no cache folder.
    """
    try:
        return cache_folder()
    except OSError as error:
        raise InputError(f"{name} has no place: {error}, or give --data.path.") from None


def _find(folders: list[Path], names: tuple[str, str]) -> tuple[Path, Path] | None:
    """The images' and the labels' file in the first folder that has both."""
    for folder in folders:
        files = [file for name in names for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
        images = next((file for file in files if file.name.startswith(names[0])), None)
        labels = next((file for file in files if file.name.startswith(names[1])), None)
        if images is not None and labels is not None:
            return images, labels
    return None


def _download(name: str, kind: MnistLike, root: Path) -> None:
    import torchvision.datasets as sets

    try:
        options = {"split": kind.part} if kind.part else {}
        getattr(sets, kind.torchvision)(str(root), download=True, **options)
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{name} could not be downloaded to {root} ({error}); put its idx files there."
        ) from None


def read_idx(file: Path, dimensions: int) -> UInt8[np.ndarray, "*shape"]:
    """The values of an idx file of bytes, compressed by gzip or not.

    Args:
        file: its path.
        dimensions: that it must have: 3 for images, 1 for labels.

    Raises:
        InputError: no idx file of bytes, of other dimensions, or cut short.
    """
    try:
        with open_regular(file) as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if packed else raw
            grown = 1100 if packed else 1  # more than gzip can shrink anything
            content = stream.read(min(LIMIT, grown * os.fstat(raw.fileno()).st_size) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file} cannot be read ({error}); use another copy.") from None
    if len(content) > LIMIT:
        raise InputError(f"{file} holds more than {LIMIT >> 20} MiB; no set of this kind is so large.")
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        raise InputError(f"{file} is not an idx file of bytes in {dimensions} dimensions; use another copy.")
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    if len(content) - start != math.prod(shape):
        raise InputError(
            f"{file} holds {len(content) - start} values, but its header says {math.prod(shape)}; "
            "use another copy."
        )
    if not math.prod(shape):
        raise InputError(f"{file} holds nothing: its header says {shape}; use another copy.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
