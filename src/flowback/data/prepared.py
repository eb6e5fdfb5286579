"""A prepared set: uint8 images of one size in one memory-mapped file, written by `flowback prepare`.

    prepared.json          format, source, settings, classes; for each split the number of images, content
                           hash, files left out, and animations and useless colour profiles
    train/images.npy       (images, channels, size, size), uint8
    train/labels.npy       (images,), int64; -1 throughout for unconditional
    train/names.txt        the images' names, one a line; ends.npy holds where each one ends
    test/...               the same; absent with --holdout 0, and then the training images are the test
    train/latents.npy      (images, 2 mirrors, 2 moments, channels, height, width), float16: mean and standard
                           deviation of z = (latent - shift) · scale, as the flow sees it
    train/features.npy     (images, 2 mirrors, grid², width), float16: an encoder's, for alignment

prepared.json is written last: a folder without it is not complete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from pydantic import Field, TypeAdapter
from torch import Tensor

from flowback.checked import from_dict
from flowback.config import CodecConfig
from flowback.data.image_set import FeatureSettings, FeatureTable, PixelSet
from flowback.devices import send
from flowback.errors import InputError, printable, shorten
from flowback.reading import read_json

__all__ = [
    "AGAIN",
    "FORMAT",
    "PreparedImages",
    "PreparedLatents",
    "is_prepared",
    "load_latents",
    "load_prepared",
    "mapped",
    "read_summary",
    "sample_posterior",
]


FORMAT = 1
"""Version of the folder's layout; a newer one is refused."""


AGAIN = "run the same `flowback prepare` into an empty folder."
"""What mends a damaged set, at the end of an error message."""


@dataclass(frozen=True)
class PreparedImages(PixelSet):
    """Images read through the memory map; see `flowback.data.image_set.ImageSet`.

    Only paths and numbers are kept or sent to other processes: each opens the files for itself, and the
    page cache is shared by all.
    """

    name: str
    classes: tuple[str, ...]
    folder: Path
    """Of the split."""
    shape: tuple[int, int, int, int]
    fingerprint: str
    """Hash of all that is stored of the images."""
    skipped: tuple[str, ...] = ()
    features: FeatureSettings | None = None
    """Of the features beside the images; None: there are none."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedImages, tuple(getattr(self, field.name) for field in fields(self))

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def pixels(self) -> UInt8[Tensor, "n c h w"]:
        """All images, mapped."""
        return mapped(self.folder / "images.npy", np.uint8, self.shape)

    @cached_property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image; None for unconditional.

        Raises:
            InputError: labels that are not those of the images.
        """
        if not self.classes:
            return None
        file = self.folder / "labels.npy"
        labels = mapped(file, np.int64, self.shape[:1])
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise InputError(f"{file} holds labels outside of the set's {len(self.classes)} classes; {AGAIN}")
        return labels

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """The images at ``indices``, copied once, from the page cache into the batch."""
        return self.pixels.index_select(0, indices)

    @cached_property
    def feature_table(self) -> FeatureTable | None:
        """The encoder's features of all images, mapped.

        Raises:
            InputError: a damaged file.
        """
        if self.features is None:
            return None
        file = self.folder / "features.npy"
        values = mapped(file, np.float16, (len(self), 2, *self.features.shape))
        return FeatureTable(file, values, self.features)

    @cached_property
    def _names(self) -> tuple[Tensor, np.memmap]:
        """Where each name ends, and the file of names, mapped."""
        ends, file = mapped(self.folder / "ends.npy", np.int64, self.shape[:1]), self.folder / "names.txt"
        try:
            if not file.is_file():
                raise OSError("not a file")
            names = np.memmap(file, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is missing or damaged ({error}); {AGAIN}") from None
        if bool((ends.diff() < 1).any()) or int(ends[0]) < 1 or int(ends[-1]) != len(names):
            raise InputError(f"{self.folder / 'ends.npy'} does not fit {file}; {AGAIN}")
        return ends, names

    def file_name(self, index: int) -> str:
        """The image's file, relative to the source."""
        ends, names = self._names
        start = int(ends[index - 1]) if index else 0
        name = names[start : int(ends[index])].tobytes().decode(errors="backslashreplace")
        return printable(name.removesuffix("\n"))


_Count = Annotated[int, Field(strict=True, ge=1)]
_Side = Annotated[int, Field(strict=True, ge=1, le=2**14)]


@dataclass(frozen=True)
class _Version:
    format: _Count


@dataclass(frozen=True)
class _Split:
    images: _Count
    fingerprint: str
    skipped: list[str]
    commits: list[tuple[_Count | Literal[0], _Count | Literal[0], str]]


@dataclass(frozen=True)
class _Settings:
    image_size: _Side
    channels: _Side
    latent: tuple[_Side, _Side, _Side] | None = None
    codec: dict[str, Any] | None = None
    features: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Summary:
    """The parts of prepared.json that are read; others may be added."""

    settings: _Settings
    classes: list[str]
    splits: dict[Literal["train", "test"], _Split]

    def __post_init__(self) -> None:
        if "train" not in self.splits or (self.settings.latent is not None) != bool(self.settings.codec):
            raise ValueError("parts are missing")


_VERSION, _SUMMARY = TypeAdapter(_Version), TypeAdapter(_Summary)


def is_prepared(path: Path) -> bool:
    """Whether ``path`` is a prepared set, complete or not."""
    return (path / "prepared.json").is_file() or (path / "preparing.json").is_file()


def load_prepared(
    path: Path, image_size: int, channels: int, split: Literal["train", "test"]
) -> PreparedImages:
    """A split of a prepared set.

    Args:
        path: the set's folder.
        image_size: height and width that the model wants; the set must have been made so.
        channels: the same for the channels.
        split: part of the set.

    Raises:
        InputError: not complete, damaged, of another size, or labels that are not those of the images.
    """
    summary = read_summary(path)
    settings, splits = summary["settings"], summary["splits"]
    prepared_as = (settings["image_size"], settings["channels"])
    if prepared_as != (image_size, channels):
        raise InputError(
            f"{path} was prepared with --image-size {prepared_as[0]} --channels {prepared_as[1]}, "
            f"but the model takes {image_size}x{image_size} with {channels}; prepare it "
            "again, or choose --model.image-size and --model.channels."
        )
    part, features = split if split in splits else "train", settings.get("features")
    part_summary = splits[part]
    images = PreparedImages(
        name=f"{path.resolve().name}-{part}",
        classes=tuple(summary["classes"]),
        folder=path / part,
        shape=(part_summary["images"], channels, image_size, image_size),
        fingerprint=part_summary["fingerprint"],
        skipped=tuple(part_summary["skipped"]),
        features=from_dict(FeatureSettings, features) if part == "train" and features else None,
    )
    _ = images.pixels, images.labels  # a damaged set is known before it is used
    return images


def read_summary(path: Path) -> dict[str, Any]:
    """prepared.json of a set.

    Raises:
        InputError: the set is not there, not complete, or from a newer flowback.
    """
    file = path / "prepared.json"
    try:
        summary = read_json(file)
        version = _VERSION.validate_python(summary).format
        if version <= FORMAT:
            _SUMMARY.validate_python(summary)
    except FileNotFoundError:
        if (path / "preparing.json").is_file():
            raise InputError(
                f"{path} is not complete; run the same `flowback prepare` again to continue."
            ) from None
        raise InputError(f"{path} holds no prepared set; make one with `flowback prepare`.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from None
    except ValueError:  # pydantic's, too
        raise InputError(f"{file} is damaged; {AGAIN}") from None
    if version > FORMAT:
        raise InputError(f"{file} has format {version}, but this flowback reads up to {FORMAT}; update it.")
    return summary


def mapped(file: Path, dtype: Any, shape: tuple[int, ...]) -> Tensor:
    """A .npy file of that dtype and shape as a tensor on the memory map; writing to it changes no file.

    Raises:
        InputError: missing, cut short, or of another shape.
    """
    if not file.exists():
        raise InputError(f"{file} is missing; {AGAIN}")
    try:
        if not file.is_file():
            raise OSError("not a file")
        # Copy on write: PyTorch has no read-only tensors.
        array = np.lib.format.open_memmap(file, mode="c")
    except Exception as error:  # of a damaged header, nearly anything
        raise InputError(f"{file} is cut short or damaged ({shorten(str(error))}); {AGAIN}") from None
    if array.shape != shape or array.dtype != dtype:
        raise InputError(
            f"{file} holds {array.dtype} {array.shape}, but prepared.json says "
            f"{np.dtype(dtype)} {shape}; {AGAIN}"
        )
    return torch.from_numpy(np.asarray(array))


@dataclass(frozen=True)
class PreparedLatents:
    """Latents read through the memory map; see `flowback.data.image_set.ImageSet`."""

    in_pixels: PreparedImages
    """The images, for encoders and references."""
    shape: tuple[int, int, int]
    """Channels, height and width of a latent."""
    codec: CodecConfig
    """The VAE that made them."""

    def __reduce__(self) -> tuple[Any, ...]:
        return PreparedLatents, (self.in_pixels, self.shape, self.codec)

    def __len__(self) -> int:
        return len(self.in_pixels)

    @property
    def name(self) -> str:
        """Name of the set and the split."""
        return self.in_pixels.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.in_pixels.classes

    @property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image."""
        return self.in_pixels.labels

    @property
    def skipped(self) -> tuple[str, ...]:
        """Files that were left out."""
        return self.in_pixels.skipped

    @property
    def fingerprint(self) -> str:
        """Hash of all that is stored of the images."""
        return self.in_pixels.fingerprint

    def file_name(self, index: int) -> str:
        """The image's file, relative to the source."""
        return self.in_pixels.file_name(index)

    @property
    def file(self) -> Path:
        """The file of the latents."""
        return self.in_pixels.folder / "latents.npy"

    @cached_property
    def moments(self) -> Float[Tensor, "n 2 2 c h w"]:
        """Mean and standard deviation of every image and its mirror image, mapped."""
        return mapped(self.file, np.float16, (len(self), 2, 2, *self.shape))

    def read(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Posterior means of the images at ``indices``: what evaluation sees."""
        return self._finite(self.moments[:, 0, 0].index_select(0, indices))

    @property
    def feature_table(self) -> FeatureTable | None:
        """Features of the images themselves."""
        return self.in_pixels.feature_table

    def read_training(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b 2 2 c h w"]:
        """Both moments of these images and of their mirror images."""
        return self._finite(self.moments.index_select(0, indices))

    def draw(
        self, stored: Float[Tensor, "b 2 2 c h w"], flipped: Bool[Tensor, " b"], noise: Callable[[], Tensor]
    ) -> Float[Tensor, "b c h w"]:
        """Latents drawn from the posterior, of the mirror image where ``flipped``."""
        return sample_posterior(send(stored, flipped.device), flipped, noise())

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
            f"{path} holds latents of {shape[0]} channels and {shape[1]}x{shape[2]}, but the model takes "
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
