"""Any folder of images: what is in it, which part is for training, and reading it.

A class is a sub-folder (images may lie deeper inside it); a folder without sub-folders is unconditional.
Where the folder has `train` and `test` or `val` inside, these are the split; `val` counts if there is no
`test`, or none with the class folders of `train`. Otherwise (or with a `train` alone) the test images are
those whose relative name hashes below `--data.holdout`: a property of the name alone, so that files added
later move no image from one side to the other.

Files count as images by their ending, hidden files do not count. A set that fits in memory is decoded at
once, so that every bad file is known before training starts; a larger one is decoded on read, and the same
choice, refuse or skip, is made then. A skipped image of a larger set is replaced by the next readable one
of its class, and logged by name. Animations and useless colour profiles are counted and named in the log.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from flowback.config import DataConfig
from flowback.data.image_set import MemoryImages, PixelSet
from flowback.data.pixels import EXTENSIONS, NOTES, Note, UnreadableImageError, note_sentence, read_image
from flowback.errors import InputError, is_utf8, printable
from flowback.progress import track

__all__ = [
    "MEMORY_LIMIT",
    "FolderImages",
    "Listing",
    "fingerprint_of",
    "held_out",
    "labels_of",
    "list_images",
    "load_folder",
    "split_folder",
    "test_folders",
]

MEMORY_LIMIT = 512 * 2**20
"""Bytes of decoded images up to which a folder is read into memory (43,690 images of 64x64)."""


_DEPTH = 100
"""Folders inside one another, below which nobody keeps images."""


logger = logging.getLogger(__name__)


class Listing(NamedTuple):
    """The images in a folder."""

    classes: tuple[str, ...]
    files: tuple[str, ...]
    """Relative to the folder, with forward slashes, sorted."""


@dataclass(frozen=True)
class FolderImages(PixelSet):
    """Images decoded on read, for folders too large for memory; see `flowback.data.image_set.ImageSet`."""

    name: str
    classes: tuple[str, ...]
    labels: Int64[Tensor, " n"] | None
    folder: Path
    files: tuple[str, ...]
    image_size: int
    channels: int
    bad_images: Literal["refuse", "skip"] = "refuse"
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Int[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """The images at ``indices``, decoded now; works in any process.

        Raises:
            InputError: an image cannot be read, and bad images are to be refused.
        """
        return torch.from_numpy(np.stack([self._read(index) for index in indices.tolist()]))

    def file_name(self, index: int) -> str:
        """The image's file, relative to the folder."""
        return printable(self.files[index])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the names, sizes and times of the files, and of the size they are brought to."""
        return fingerprint_of(self.folder, self.files, f"{self.image_size} {self.channels}")

    def _read(self, index: int) -> UInt8[np.ndarray, "c s s"]:
        for other in self._successors(index):
            try:
                file = self.folder / self.files[other]
                pixels, notes = read_image(file, self.image_size, self.channels)
                for note in notes:
                    _note_once(self.folder / self.file_name(other), note)
                return pixels
            except UnreadableImageError as error:
                if self.bad_images == "refuse":
                    bad = [f"{self.file_name(other)} ({error})"]
                    raise _refusal(self.folder, bad, len(self)) from None
                logger.warning("Skipped %s (%s)", self.folder / self.file_name(other), error)
        raise InputError(
            f"No image of the class of {self.folder / self.file_name(index)} can be read; replace them."
        )

    def _successors(self, index: int) -> Iterator[int]:
        """``index``, and then all others of its class."""
        for step in range(len(self)):
            other = (index + step) % len(self)
            if self.labels is None or self.labels[other] == self.labels[index]:
                yield other


def load_folder(
    data: DataConfig, image_size: int, channels: int, split: Literal["train", "test"]
) -> MemoryImages | FolderImages:
    """The training or test images of a folder.

    Raises:
        InputError: no folder, no images in it, sub-folders that do not fit together, or unreadable images.
    """
    if data.path is None:
        raise InputError("--data.name folder needs the folder of images; give it as --data.path.")
    if not data.path.is_dir():
        raise InputError(f"--data.path {data.path} is not a folder; give a folder of images.")
    folder, listing = split_folder(data.path, data.holdout, split)
    name = f"{data.path.resolve().name}-{split}"
    if len(listing.files) * channels * image_size**2 > MEMORY_LIMIT:
        labels = labels_of(listing.classes, listing.files)
        return FolderImages(
            name, listing.classes, labels, folder, listing.files, image_size, channels, data.bad_images
        )
    files, pixels, bad, noted = _read_all(folder, listing.files, image_size, channels)
    if bad and (data.bad_images == "refuse" or not files):
        raise _refusal(folder, bad, len(listing.files))
    if bad:
        logger.warning(
            "Skipped %d of the %d images in %s: %s", len(bad), len(listing.files), folder, _name(bad, 20)
        )
    for note, names in noted.items():
        logger.warning("%s", note_sentence(note, len(names), len(files), names[:8], folder))
    shown = tuple(map(printable, files))
    return MemoryImages(name, listing.classes, labels_of(listing.classes, files), pixels, shown, tuple(bad))


def split_folder(root: Path, holdout: float, split: Literal["train", "test"]) -> tuple[Path, Listing]:
    """The folder that holds a split, and the split's images in it.

    Raises:
        InputError: no images, sub-folders that do not fit together, or a split without images.
    """
    train, tests = root / "train", test_folders(root)
    if train.is_dir() and tests:
        listing = list_images(train)
        if split == "train":
            return train, listing
        for test in tests:
            found = list_images(test)
            fits = set(found.classes) <= set(listing.classes) and bool(found.classes) == bool(listing.classes)
            if fits:
                return test, Listing(listing.classes, found.files)
        raise InputError(
            f"The class folders of {tests[0]} are not those of {train}; give both the same sub-folders."
        )
    listing = list_images(root)
    if listing.classes == ("train",):
        root, listing = train, list_images(train)
    if holdout == 0:
        return root, listing
    if len(listing.files) == 1:
        raise InputError(
            f"{root} holds one image, none is left for the test; add some, or use --data.holdout 0."
        )
    tested = held_out(listing.files, holdout)
    files = [file for file, own in zip(listing.files, tested, strict=True) if own == (split == "test")]
    if not files:
        raise InputError(
            f"--data.holdout {holdout} leaves none of the {len(listing.files)} images in {root} "
            "for training; lower it."
        )
    return root, Listing(listing.classes, tuple(files))


def test_folders(root: Path) -> list[Path]:
    """The folders that may be the test: `test`, and after it `val`, which is the labelled one in ImageNet."""
    return [root / name for name in ("test", "val") if (root / name).is_dir()]


def held_out(names: Sequence[str], holdout: float) -> list[bool]:
    """For each image, whether it is kept for the test; at least one is."""
    shares = [_share(name) for name in names]
    limit = max(holdout, min(shares) + 2**-54)
    return [share < limit for share in shares]


def fingerprint_of(folder: Path, files: Iterable[str], key: str = "") -> str:
    """Hash of ``key`` and of the names, sizes and times of files."""
    digest = hashlib.blake2b(key.encode(), digest_size=16)
    for file in files:
        digest.update(f"\0{file}".encode(errors="surrogateescape"))
        with contextlib.suppress(OSError):  # a link that leads nowhere, or to itself
            state = (folder / file).stat()
            digest.update(f"\0{state.st_size}\0{state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _share(file: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    digest = hashlib.blake2b(file.encode(errors="surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def list_images(folder: Path) -> Listing:
    """All images in a folder, classes by sub-folder.

    Raises:
        InputError: none, or both images and folders of images.
    """
    files = sorted(_walk(folder))
    if not files:
        raise InputError(f"{folder} holds no images (files ending in {', '.join(sorted(EXTENSIONS))}).")
    if odd := next((file for file in files if "/" in file and not is_utf8(_class_of(file))), None):
        raise InputError(
            f"{folder} holds the folder {printable(_class_of(odd))}, whose name is not UTF-8; rename it: a "
            "class gets its name."
        )
    nested = [file for file in files if "/" in file]
    if not nested:
        return Listing((), tuple(files))
    if len(nested) < len(files):
        alone = next(file for file in files if "/" not in file)
        raise InputError(
            f"{folder} holds both images ({printable(alone)}) and folders of images "
            f"({printable(_class_of(nested[0]))}); a class is a sub-folder, so move the images into "
            "sub-folders, or all into one folder."
        )
    return Listing(tuple(name for name, _ in groupby(files, key=_class_of)), tuple(files))


def _class_of(file: str) -> str:
    return file.split("/", 1)[0]


def _walk(folder: Path, prefix: str = "", above: tuple[os.stat_result, ...] = ()) -> Iterator[str]:
    """Relative names of all image files; follows links, but not round in circles.

    Raises:
        InputError: a folder that cannot be read, or folders nested too deep.
    """
    if len(above) > _DEPTH:
        raise InputError(f"{printable(str(folder))} lies too deep; images lie at most {_DEPTH} folders deep.")
    try:
        own = folder.stat()
        with os.scandir(folder) as scanned:
            entries = list(scanned)
    except OSError as error:
        raise InputError(f"{printable(str(folder))} cannot be read: {error.strerror}.") from None
    if any(os.path.samestat(own, other) for other in above):
        return
    for entry in entries:
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if _is_folder(entry):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, own))
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def labels_of(classes: tuple[str, ...], files: tuple[str, ...]) -> Int64[Tensor, " n"] | None:
    """Class of each file by its sub-folder; None without classes."""
    if not classes:
        return None
    number = {name: index for index, name in enumerate(classes)}
    return torch.tensor([number[_class_of(file)] for file in files], dtype=torch.int64)


def _read_all(
    folder: Path, files: tuple[str, ...], image_size: int, channels: int
) -> tuple[tuple[str, ...], UInt8[Tensor, "n c h w"], list[str], dict[Note, list[str]]]:
    """The readable files, their images, the others with the reason, and files with a note."""

    def read(file: str) -> tuple[np.ndarray, tuple[Note, ...]] | UnreadableImageError:
        try:
            return read_image(folder / file, image_size, channels)
        except UnreadableImageError as error:
            return error

    pixels = torch.empty(len(files), channels, image_size, image_size, dtype=torch.uint8)
    good: list[str] = []
    bad: list[str] = []
    noted: dict[Note, list[str]] = {}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # decoders release the GIL
        results = track(pool.map(read, files), len(files), "Reading images")
        for file, result in zip(files, results, strict=True):
            if isinstance(result, UnreadableImageError):
                bad.append(f"{printable(file)} ({result})")
            else:
                image, notes = result
                pixels[len(good)] = torch.from_numpy(image.copy())
                good.append(file)
                for note in notes:
                    noted.setdefault(note, []).append(printable(file))
    return tuple(good), pixels[: len(good)], bad, noted


@lru_cache(maxsize=10_000)
def _note_once(file: Path, note: Note) -> None:
    """Say once in this process what is to be known of a file that is read again and again."""
    logger.warning("%s has %s.", file, NOTES[note])


def _refusal(folder: Path, bad: list[str], total: int) -> InputError:
    return InputError(
        f"{len(bad)} of the {total} images in {folder} cannot be read: {_name(bad, 3)}; "
        "repair or remove them, or leave them out with --data.bad-images skip."
    )


def _name(bad: list[str], most: int) -> str:
    """The first ``most`` of the bad files, and the number of the others."""
    return ", ".join(bad[:most]) + (f" and {len(bad) - most} more" if len(bad) > most else "")
