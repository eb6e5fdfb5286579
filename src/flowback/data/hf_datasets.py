"""Data sets of the Hugging Face library `datasets`: by their name on the hub, or a folder that it saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from flowback import hub
from flowback.data.image_folder import held_out
from flowback.data.pixels import UnreadableImageError
from flowback.errors import InputError

__all__ = ["HubSource", "is_saved", "open_hub"]

_TESTS = ("test", "validation", "val", "valid")
_IMAGES, _LABELS = ("image", "img"), ("label", "labels", "class")
"""Names that decide between several columns of images or of classes."""


@dataclass(frozen=True)
class HubSource:
    """A table with a column of images; see `flowback.data.sources.Source`."""

    name: str
    table: Any
    image: str
    """Name of the column of images, which are not decoded."""
    classes: tuple[str, ...]
    labels: Int64[Tensor, " n"] | None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        """The library's own hash of the table and how it came to be."""
        return str(self.table._fingerprint)

    def file_name(self, index: int) -> str:
        """The set's name and the row."""
        return f"{self.name}-{index:08d}"

    def open(self, index: int) -> Path | bytes | Image.Image:
        """The image's file, or its bytes.

        Raises:
            UnreadableImageError: the row has no image.
        """
        cell = self.table[index][self.image] or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if not cell.get("path"):
            raise UnreadableImageError("no image in this row")
        return Path(cell["path"])


def is_saved(path: Path) -> bool:
    """Whether ``path`` is a folder written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def open_hub(data: str, holdout: float) -> dict[Literal["train", "test"], HubSource]:
    """The training and test images of `hf:NAME`, `hf:NAME@REVISION` or a saved folder.

    Raises:
        InputError: no package, no such set, or no column of images.
    """
    try:
        import datasets
    except ImportError:
        raise InputError(f"{data} needs the package `datasets`: pip install flowback-nf[datasets].") from None
    try:
        if data.startswith("hf:"):
            name, _, revision = data.removeprefix("hf:").partition("@")
            with hub.quick():
                loaded = datasets.load_dataset(name, revision=revision or None)
        else:
            loaded = datasets.load_from_disk(data)
    except Exception as error:  # the hub's client has many kinds
        reason = hub.reason(error, data.removeprefix("hf:"))
        raise InputError(f"{data} cannot be loaded by `datasets` ({reason}); check its name.") from None
    parts: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in parts and len(parts) > 1:
        raise InputError(f"{data} has the splits {', '.join(parts)}, none called train; save it with one.")
    train = parts.get("train", next(iter(parts.values())))
    columns = _columns(data, train)
    short = Path(data.removeprefix("hf:")).name.partition("@")[0]
    source = _source(f"{short}-train", train, columns)
    tests = {name: parts[name] for name in _TESTS if name in parts and parts[name] is not train}
    if tests:
        return {"train": source, "test": _first_usable(f"{short}-test", tests, columns)}
    if holdout == 0:
        return {"train": source}
    tested = np.asarray(held_out([str(row) for row in range(len(train))], holdout), dtype=bool)
    return {
        "train": _source(f"{short}-train", train.select(np.flatnonzero(~tested)), columns),
        "test": _source(f"{short}-test", train.select(np.flatnonzero(tested)), columns),
    }


class _Columns(NamedTuple):
    """The columns of a data set that are used."""

    data: str
    """What the data set is called."""
    image: str
    label: str | None
    classes: tuple[str, ...]


def _columns(data: str, table: Any) -> _Columns:
    """Those of the training split; what could be read in two ways is refused."""
    import datasets

    kinds = table.features
    remedy = "save the set with `datasets` so that it has one, and give that folder"
    images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise InputError(f"{data} has no column of images; its columns are {', '.join(kinds)}.")
    if len(images) > 1:
        images = [name for name in images if name in _IMAGES] or images
    labels = [name for name, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)]
    if len(labels) > 1:
        labels = [name for name in labels if name in _LABELS] or labels
    for what, names in ("images", images), ("classes", labels):
        if len(names) > 1:
            raise InputError(f"{data} has several columns of {what} ({', '.join(names)}); {remedy}.")
    unnamed = [name for name in kinds if name in _LABELS and name not in labels]
    if unnamed and not labels:
        raise InputError(
            f"{data}: the column {unnamed[0]} has no names of classes; make it one of them with "
            f"`class_encode_column` of `datasets`, or remove it, and give the folder that you save."
        )
    label = labels[0] if labels else None
    return _Columns(data, images[0], label, tuple(kinds[label].names) if label else ())


def _first_usable(name: str, splits: dict[str, Any], columns: _Columns) -> HubSource:
    """The first of the splits whose images have the labels of the training images."""
    refusals = []
    for split in splits.values():
        try:
            return _source(name, split, columns)
        except InputError as refusal:  # ImageNet's `test` has no labels, but its `validation` has
            refusals.append(refusal)
    raise refusals[0]


def _source(name: str, table: Any, columns: _Columns) -> HubSource:
    import datasets

    data, image, label, classes = columns
    kinds = table.features
    if image not in kinds or (label is not None and not isinstance(kinds.get(label), datasets.ClassLabel)):
        raise InputError(f"{data}: {name} has other columns ({', '.join(kinds)}) than the training images.")
    labels = None
    if label is not None:
        unknown = [str(each) for each in kinds[label].names if each not in classes]
        if unknown:
            raise InputError(f"{data}: {name} has the class {unknown[0]}, which no training image has.")
        ids = list(table[label])
        if any(each is None or each < 0 for each in ids):
            raise InputError(f"{data}: images of {name} have no label; remove them, or the column {label}.")
        number = torch.tensor([classes.index(each) for each in kinds[label].names])
        labels = number[torch.tensor(ids, dtype=torch.int64)]
    plain = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return HubSource(name, plain, image, classes, labels)
