"""What `flowback prepare` reads: images one by one, in a fixed order, with names and labels.

A source only lists; its images are opened by the processes that decode them. The listing is the one thing
that is held in memory: about 150 bytes an image.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from flowback.config import DataConfig
from flowback.data.hf_datasets import is_saved, open_hub
from flowback.data.image_folder import (
    fingerprint_of,
    held_out,
    labels_of,
    list_images,
    split_folder,
    test_folders,
)
from flowback.data.named_sets import Pictures, dataset_names, pictures
from flowback.data.shards import is_sharded, open_shards
from flowback.errors import InputError, printable, shorten
from flowback.reading import problem, read_text

__all__ = ["FileSource", "PictureSource", "Source", "Split", "open_source"]

Split = Literal["train", "test"]

_PREDICTION = re.compile(r"(\S+)(?: -?\d+){4}(?: \S+(?: -?\d+){4})*")
"""ImageNet's prediction string: a class and the four numbers of its box, for each object in the image."""


@runtime_checkable
class Source(Protocol):
    """Images of any size and kind."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty for unconditional."""
        ...

    @property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image; None for unconditional."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash that changes when the source does."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def file_name(self, index: int) -> str:
        """Name of an image."""
        ...

    def open(self, index: int) -> Path | bytes | Image.Image:
        """An image as a file, the bytes of one, or decoded."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Files in a folder."""

    classes: tuple[str, ...]
    labels: Int64[Tensor, " n"] | None
    folder: Path
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of names, sizes, times and labels."""
        labels = "" if self.labels is None else hashlib.blake2b(self.labels.numpy().tobytes()).hexdigest()
        return fingerprint_of(self.folder, self.files, labels)

    def file_name(self, index: int) -> str:
        """The file, relative to the folder."""
        return printable(self.files[index])

    def open(self, index: int) -> Path:
        """The file's path."""
        return self.folder / self.files[index]


@dataclass(frozen=True)
class PictureSource:
    """Images in memory."""

    name: str
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.pictures.images)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.pictures.classes

    @cached_property
    def labels(self) -> Int64[Tensor, " n"] | None:
        """Class of each image; None for unconditional."""
        targets = self.pictures.targets
        return None if targets is None else torch.as_tensor(targets, dtype=torch.int64)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the pixels and labels."""
        labels = b"" if self.labels is None else self.labels.numpy().tobytes()
        digest = hashlib.blake2b(labels, digest_size=16)
        for image in self.pictures.images:
            digest.update(np.asarray(image).tobytes())
        return digest.hexdigest()

    def file_name(self, index: int) -> str:
        """The set's name and the image's number."""
        return f"{self.name}-{index:06d}"

    def open(self, index: int) -> Image.Image:
        """The image."""
        return self.pictures.images[index]


def open_source(
    data: str, image_size: int, channels: int, holdout: float, labels: Path | None = None,
    path: Path | None = None, download: bool = False,
) -> Mapping[Split, Source]:  # fmt: skip
    """The training and test images of ``data``; with ``holdout`` 0 and no split of its own, no test.

    Args:
        data: a folder of images, a folder of tar shards or one shard, `hf:NAME` or a folder written by
            `datasets`, or a set known by name.
        image_size: size that FakeData is made at.
        channels: of FakeData.
        holdout: share kept for the test where the source has no split.
        labels: CSV file of image and class, for images that do not lie in class folders.
        path: where the files of a named set lie.
        download: fetch a named set.

    Raises:
        InputError: nothing there, or parts that do not fit together.
    """
    if labels is not None and not Path(data).is_dir():
        raise InputError(f"--labels {labels} needs a folder of images, and {data} is not one.")
    if data.startswith("hf:") or is_saved(Path(data)):
        return open_hub(data, holdout)
    if data in dataset_names():
        config = DataConfig(data, path, download)
        splits: tuple[Split, ...] = ("train", "test")
        return {
            split: PictureSource(f"{data}-{split}", pictures(config, image_size, channels, split))
            for split in splits
        }
    root = Path(data)
    if is_sharded(root):
        return open_shards(root, holdout)
    if not root.is_dir():
        raise InputError(f"{data} is not a folder, a tar file, the name of a known set, or hf:NAME.")
    return _labelled(root, labels, holdout) if labels is not None else _folder(root, holdout)


def _folder(root: Path, holdout: float) -> dict[Split, Source]:
    """The split that training from the folder itself would make."""
    sources: dict[Split, Source] = {}
    folder, listing = split_folder(root, holdout, "train")
    splits: list[Split] = ["train", "test"]
    if holdout == 0 and split_folder(root, holdout, "test") == (folder, listing):
        splits = ["train"]
    for split in splits:
        folder, listing = split_folder(root, holdout, split)
        sources[split] = FileSource(
            listing.classes, labels_of(listing.classes, listing.files), folder, listing.files
        )
    return sources


def _labelled(root: Path, labels: Path, holdout: float) -> dict[Split, Source]:
    """A folder whose images, all or those of the test, get their classes from a file."""
    train, tests = root / "train", test_folders(root)
    if train.is_dir() and tests:
        refusals = []
        for test in tests:  # ImageNet has both, and its list is of `val`
            try:
                return _labelled_split(train, test, labels)
            except InputError as refusal:
                refusals.append(refusal)
        raise refusals[0]
    listing = list_images(root)
    if listing.classes:
        raise InputError(f"{root} has class folders; leave --labels {labels} out.")
    table = _read_labels(labels, listing.files, root)
    classes = tuple(sorted(set(table.values())))
    tested = held_out(listing.files, holdout) if holdout else [False] * len(listing.files)
    sources: dict[Split, Source] = {}
    splits: tuple[Split, ...] = ("train", "test") if holdout else ("train",)
    for split in splits:
        files = tuple(
            file for file, is_test in zip(listing.files, tested, strict=True) if is_test == (split == "test")
        )
        sources[split] = FileSource(classes, _numbers(files, table, classes, labels), root, files)
    return sources


def _labelled_split(train: Path, test: Path, labels: Path) -> dict[Split, Source]:
    """Two folders, of which at least one is flat and in the file."""
    listings = {"train": list_images(train), "test": list_images(test)}
    flat = [listing.files for listing in listings.values() if not listing.classes]
    both = sorted(set(flat[0]) & set(flat[1])) if len(flat) == 2 else []
    if both:
        raise InputError(
            f"{both[0]} is in {train} and in {test}, so --labels {labels} does not say which one it means; "
            "give the images different names."
        )
    table = _read_labels(labels, [file for files in flat for file in files], train.parent)
    classes = listings["train"].classes or tuple(sorted(set(table.values())))
    sides: tuple[tuple[Split, Path], ...] = (("train", train), ("test", test))
    return {
        split: FileSource(
            classes, _numbers(listings[split].files, table, classes, labels), folder, listings[split].files
        )
        for split, folder in sides
    }


def _read_labels(file: Path, files: Sequence[str], folder: Path) -> dict[str, str]:
    """Class of each of ``files``: the second column; the ending of a name may be left out.

    A first line that names none of the files is a heading; more columns need one. Of ImageNet's prediction
    strings, the class is the first word.
    """
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(file), newline="")) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"--labels {file} cannot be read: {problem(error)}; give a CSV file in UTF-8."
        ) from None
    exact, stems = set(files), defaultdict(list)
    for known in files:
        stems[_stem(known)].append(known)
    table: dict[str, str] = {}
    columns = 2
    for number, row in enumerate(rows, start=1):
        meant = [row[0]] if row[0] in exact else stems.get(row[0]) or stems.get(_stem(row[0])) or []
        name = meant[0] if meant else None
        if name is None and number == 1:
            columns = max(columns, len(row))
            continue
        if len(meant) > 1:
            raise InputError(
                f"--labels {file}, line {number}: {row[0]} may be {' or '.join(meant)}; give the ending, too."
            )
        if name is None:
            raise InputError(
                f"--labels {file}, line {number}: {shorten(row[0])} is not in {folder}; "
                "give the labels of its images."
            )
        if len(row) < 2 or not row[1].strip():
            raise InputError(f"--labels {file}, line {number}: not `image,class`.")
        if len(row) > columns:
            raise InputError(
                f"--labels {file}, line {number}: {len(row)} columns, not `image,class`; put a class with a "
                "comma in quotes, or name the columns in a first line."
            )
        prediction = _PREDICTION.fullmatch(row[1].strip())
        label = prediction[1] if prediction else " ".join(row[1].split())
        if table.setdefault(name, label) != label:
            raise InputError(f"--labels {file}, line {number}: {shorten(row[0])} has two classes; keep one.")
    missing = [name for name in files if name not in table]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"--labels {file} gives no class for {printable(missing[0])}{more}; add them.")
    return table


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0] if "." in name.rsplit("/", 1)[-1] else name


def _numbers(
    files: Sequence[str], table: dict[str, str], classes: tuple[str, ...], labels: Path
) -> Int64[Tensor, " n"]:
    """Class of each file: by the table, or by its folder."""
    number = {name: index for index, name in enumerate(classes)}
    named = [table.get(file) or file.split("/", 1)[0] for file in files]
    wrong = next((row for row, name in enumerate(named) if name not in number), None)
    if wrong is not None:
        raise InputError(
            f"--labels {labels}: {printable(files[wrong])} has the class {named[wrong]}, "
            "which no training image has."
        )
    return torch.tensor([number[name] for name in named], dtype=torch.int64)
