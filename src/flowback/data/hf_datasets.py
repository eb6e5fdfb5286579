"""Data sets of the Hugging Face library `datasets`: by their name on the hub, or a folder that it saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from flowback.data.image_folder import held_out
from flowback.data.pixels import UnreadableImageError
from flowback.errors import InputError

__all__ = ["HubSource", "is_saved", "open_hub"]

_TESTS = ("test", "validation", "val", "valid")


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
            loaded = datasets.load_dataset(name, revision=revision or None)
        else:
            loaded = datasets.load_from_disk(data)
    except Exception as error:  # the hub's client has many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{data} cannot be loaded by `datasets` ({reason}); check its name.") from None
    parts: dict[str, Any] = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    test = next((name for name in _TESTS if name in parts), None)
    train = parts["train"] if "train" in parts else next(iter(parts.values()))
    short = Path(data.removeprefix("hf:")).name.partition("@")[0]
    if test is not None and parts[test] is not train:
        return {
            "train": _source(data, f"{short}-train", train),
            "test": _source(data, f"{short}-test", parts[test]),
        }
    if holdout == 0:
        return {"train": _source(data, f"{short}-train", train)}
    tested = np.asarray(held_out([str(row) for row in range(len(train))], holdout), dtype=bool)
    return {
        "train": _source(data, f"{short}-train", train.select(np.flatnonzero(~tested))),
        "test": _source(data, f"{short}-test", train.select(np.flatnonzero(tested))),
    }


def _source(data: str, name: str, table: Any) -> HubSource:
    import datasets

    columns = table.features
    image = next((key for key, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise InputError(f"{data} has no column of images; its columns are {', '.join(columns)}.")
    label = next((key for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)), None)
    classes = tuple(columns[label].names) if label is not None else ()
    labels = None if label is None else _ids(name, label, list(table[label]))
    plain = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return HubSource(name, plain, image, classes, labels)


def _ids(name: str, column: str, values: list[int | None]) -> Int64[Tensor, " n"]:
    if None in values:
        raise InputError(f"Row {values.index(None)} of {name} has no {column}; give all rows a class.")
    return torch.tensor(values, dtype=torch.int64)
