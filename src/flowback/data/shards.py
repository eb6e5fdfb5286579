"""Tar shards in webdataset's layout, read in place.

Members of a shard that share a name up to its first dot are one sample, wherever they stand. Its image is
the one member with the ending of an image; `.cls` (a number) or `.json` (with "label") gives its class;
without any of them, the folder inside the shard does. `classes.txt` beside the shards, one a line, names the
classes. Only uncompressed shards: their images are then read by offset, in any process.
"""

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from flowback.data.image_folder import fingerprint_of, held_out
from flowback.data.pixels import EXTENSIONS
from flowback.errors import InputError, printable, shorten
from flowback.reading import open_regular, parse_json, problem, read_text

__all__ = ["ShardSource", "is_sharded", "open_shards"]

_BLOCK = 512
_LABEL = 2**20
"""Bytes of a member that gives a label."""
_TESTS = ("test", "val")

_UNNAMED_CLASSES = 1000
"""Without names, a label may be at least below this, or below the number of images."""


@dataclass(frozen=True)
class ShardSource:
    """Images in tar files; see `flowback.data.sources.Source`."""

    classes: tuple[str, ...]
    labels: Int64[Tensor, " n"] | None
    shards: tuple[Path, ...]
    names: tuple[str, ...]
    places: Int64[Tensor, "n 3"]
    """Shard, offset and length of each image."""

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the shards' names, sizes and times, and of which images are meant."""
        files = [shard.name for shard in self.shards]
        return fingerprint_of(self.shards[0].parent, files, f"{len(self)} {self.places.sum(0).tolist()}")

    def file_name(self, index: int) -> str:
        """Name inside of the shard."""
        return printable(self.names[index])

    def open(self, index: int) -> bytes:
        """The image's file."""
        shard, offset, length = self.places[index].tolist()
        with self.shards[shard].open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass
class _Sample:
    """Members of a shard that belong together."""

    image: tuple[str, int, int] | None = None
    """Name, offset and length."""
    label: int | None = None
    labelled_by: str = ""
    """The member that gave the label."""


class _Index:
    """What lies where in some shards."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.places = array("q")
        self.classes: list[int | str | None] = []


def is_sharded(root: Path) -> bool:
    """Whether ``root`` is a tar file, or a folder with some in it or in its `train`."""
    return root.suffix == ".tar" or any(root.glob("*.tar")) or any(root.glob("train/*.tar"))


def open_shards(root: Path, holdout: float) -> dict[Literal["train", "test"], ShardSource]:
    """The training and test images in tar shards.

    The split is that of the folders or files `train...` and `test...` or `val...`; without, by ``holdout``.

    Raises:
        InputError: a shard cut short, labels for some images only, or no images.
    """
    files, tests = _shards(root)
    index, indexed = _index(files), [(files, _index(files)) for files in tests]
    kinds = _kinds(index)
    fitting = [pair for pair in indexed if _kinds(pair[1]) == kinds]
    if len(kinds) > 1 or (indexed and not fitting):
        raise InputError(
            f"{root}: some images have a class (.cls, .json or a folder) and others another kind or none; "
            "give all of them one."
        )
    parts = [(files, index), *fitting[:1]]
    names = _class_names(root, [value for _, part in parts for value in part.classes])
    train, *test = (_source(*part, names) for part in parts)
    if test:
        return {"train": train, "test": test[0]}
    if holdout == 0:
        return {"train": train}
    tested = torch.tensor(held_out(train.names, holdout))
    if bool(tested.all()):
        raise InputError(f"--holdout {holdout} leaves no image of {root} for training; lower it.")
    return {"train": _part(train, ~tested), "test": _part(train, tested)}


def _kinds(index: _Index) -> set[type]:
    """How the images say their class: by number, by folder, or not at all."""
    return {type(value) for value in index.classes}


def _shards(root: Path) -> tuple[list[Path], list[list[Path]]]:
    """The shards for training, and those that may be the test: `test...`, and after them `val...`."""
    if root.suffix == ".tar":
        files = [root]
        if not root.is_file():
            raise InputError(f"{root} does not exist.")
    else:
        files = sorted(root.glob("*.tar"))
    if not files:
        tests = [sorted((root / name).glob("*.tar")) for name in _TESTS]
        return sorted((root / "train").glob("*.tar")), [shards for shards in tests if shards]
    train = [file for file in files if not file.name.startswith(_TESTS)]
    if not train:
        return files, []
    tests = [[file for file in files if file.name.startswith(name)] for name in _TESTS]
    return train, [shards for shards in tests if shards]


def _index(shards: Iterable[Path]) -> _Index:
    """Read the headers of all members."""
    index = _Index()
    for number, shard in enumerate(shards):
        samples: dict[str, _Sample] = {}
        for name, offset, length, text in _members(shard):
            _, _, ending = name.rpartition("/")[2].partition(".")
            sample = samples.setdefault(name.removesuffix(f".{ending}"), _Sample())
            if "." + ending.lower().rpartition(".")[2] in EXTENSIONS:
                if sample.image is not None:
                    raise InputError(
                        f"{shard}: {sample.image[0]} and {name} are two images of one sample, whose name "
                        "ends at the first dot; keep one of them."
                    )
                sample.image = (name, offset, length)
            elif text is not None and (label := _label(shard, name, text)) is not None:
                if sample.label not in (None, label):
                    raise InputError(
                        f"{shard}: {sample.labelled_by} and {name} give one image two classes; keep one."
                    )
                sample.label, sample.labelled_by = label, name
        for sample in samples.values():
            _keep(index, number, shard, sample)
    return index


def _keep(index: _Index, number: int, shard: Path, sample: _Sample) -> None:
    if sample.image is None:
        if sample.label is not None:
            raise InputError(
                f"{shard}: {sample.labelled_by} gives a class, but no image in this shard has its name; "
                "put both into one shard."
            )
        return
    name, offset, length = sample.image
    folder = name.rpartition("/")[0].rpartition("/")[2]
    index.names.append(name)
    index.places.extend((number, offset, length))
    index.classes.append(sample.label if sample.label is not None else folder or None)


def _members(shard: Path) -> Iterator[tuple[str, int, int, bytes | None]]:
    """Name, offset and length of each file, and the content of labels."""
    end = 0
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            length = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                if not end < tar.offset <= length:  # a negative size would lead back, and round in circles
                    raise tarfile.ReadError("a member of another size than its header says")
                end = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them
                if not member.isreg():
                    continue
                name = member.name.removeprefix("./")
                if member.issparse():
                    raise tarfile.ReadError(f"{shorten(name)} is sparse: write shards without --sparse")
                text = None
                if name.endswith((".cls", ".json")):
                    if member.size > _LABEL:
                        raise tarfile.ReadError(f"{shorten(name)} is too long for a label")
                    file.seek(member.offset_data)
                    text = file.read(member.size)
                yield name, member.offset_data, member.size, text
            file.seek(end)
            closing = file.read(_BLOCK)
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{shard} is cut short, compressed or not a tar file ({shorten(str(error)) or 'damaged'}); "
            "use another copy."
        ) from None
    if closing != bytes(_BLOCK):  # every tar file ends with empty blocks
        raise InputError(f"{shard} is cut short: it has no end mark; use another copy.")


def _label(shard: Path, name: str, text: bytes) -> int | None:
    try:
        value = parse_json(text)
    except ValueError:
        raise InputError(
            f"{shard}: {shorten(name)} holds no number; a .cls file must hold the class id."
        ) from None
    if name.endswith(".json"):
        value = value.get("label") if isinstance(value, dict) else None
        if value is None:
            return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        shown = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else shorten(json.dumps(value))
        raise InputError(f"{shard}: {shorten(name)} holds the label {shown}; labels are numbers from 0.")
    return value


def _class_names(root: Path, values: list[int | str | None]) -> tuple[str, ...]:
    """Names of the classes, from folders, from classes.txt or by number."""
    if not values:
        raise InputError(f"The shards in {root} hold no images.")
    if values[0] is None:
        return ()
    if isinstance(values[0], str):
        return tuple(sorted({str(value) for value in values}))
    count = 1 + max(int(value) for value in values if value is not None)
    file = (root if root.is_dir() else root.parent) / "classes.txt"
    if not os.path.lexists(file):
        if count > max(len(values), _UNNAMED_CLASSES):
            raise InputError(
                f"The shards in {root} hold the label {count - 1}, but only {len(values)} images; if it is "
                f"right, name all classes in {file}, one a line."
            )
        return tuple(map(str, range(count)))
    try:
        names = tuple(read_text(file).replace("\r\n", "\n").split("\n"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file} cannot be read: {problem(error)}; name all classes in it, one a line."
        ) from None
    names = names[:-1] if names[-1] == "" else names
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise InputError(f"{file} names two classes {twice[0]!r}; give each its own name.")
    if len(names) < count:
        raise InputError(f"{file} names {len(names)} classes, but the shards hold labels up to {count - 1}.")
    return names


def _source(shards: list[Path], index: _Index, names: tuple[str, ...]) -> ShardSource:
    number: dict[int | str | None, int] = {name: k for k, name in enumerate(names)}
    number |= {k: k for k in range(len(names))}
    labels = torch.tensor([number[value] for value in index.classes], dtype=torch.int64) if names else None
    places = torch.tensor(index.places, dtype=torch.int64).view(-1, 3)
    return ShardSource(names, labels, tuple(shards), tuple(index.names), places)


def _part(source: ShardSource, mask: Tensor) -> ShardSource:
    names = tuple(name for name, chosen in zip(source.names, mask.tolist(), strict=True) if chosen)
    labels = None if source.labels is None else source.labels[mask]
    return ShardSource(source.classes, labels, source.shards, names, source.places[mask])
