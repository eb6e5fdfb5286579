"""What the evaluating verbs look at: a checkpoint or images, and the data that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

import torch
import tyro

from flowback import checkpoint
from flowback.config import DataConfig, ModelConfig
from flowback.data.images import ImageSet, load_images
from flowback.errors import InputError

__all__ = ["held_out", "is_checkpoint", "out_folder", "parse", "pick_device"]

Options = TypeVar("Options")

_NAMES = get_args(get_type_hints(DataConfig)["name"])


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint or a run."""
    return (path / "config.json").is_file() or bool(checkpoint.step_folders(path))


def parse(kind: type[Options], argv: Sequence[str], verb: str) -> Options:
    """Options of ``kind`` from the command line; the data default to those of the checkpoint named first.

    ``--data NAME`` and ``--data FOLDER`` are short for ``--data.name`` and ``--data.path``.
    """
    named = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    defaults = {}
    if named is not None and is_checkpoint(named):
        defaults["data"] = checkpoint.load_config(named).data
    path_given = any(word.split("=")[0] == "--data.path" for word in argv)
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--data":
            words[-1:] = _shorthand(word, path_given)
        elif word.startswith("--data="):
            words += _shorthand(word.removeprefix("--data="), path_given)
        else:
            words.append(word)
    default = kind(named if named is not None else tyro.MISSING, **defaults)  # type: ignore[call-arg]
    return tyro.cli(kind, args=words, default=default, prog=f"flowback {verb}")


def _shorthand(value: str, path_given: bool) -> list[str]:
    """A set by name does without the checkpoint's path, unless one is given."""
    if value not in _NAMES:
        return ["--data.name", "folder", "--data.path", value]  # a prepared set is recognised there
    return ["--data.name", value, *(() if path_given else ("--data.path", "None"))]


def held_out(data: DataConfig, model: ModelConfig, split: str = "test") -> ImageSet:
    """A split of the data at the model's size, with the model's classes.

    Raises:
        InputError: the images are not there, or have other classes than the model.
    """
    images = load_images(data, model.image_size, model.channels, "train" if split == "train" else "test")
    if model.num_classes and images.classes and len(images.classes) != model.num_classes:
        raise InputError(
            f"{images.name} has {len(images.classes)} classes, the model {model.num_classes}; "
            "give the data it was trained on with --data."
        )
    return images


def out_folder(out: Path | None, subject: Path) -> Path:
    """Where records and pictures go: as asked, or beside the checkpoint."""
    return out or (subject / "evaluation" if is_checkpoint(subject) else Path("evaluation"))


def pick_device(name: str) -> torch.device:
    """The device of an option ``--device``.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} is not available here ({str(error).splitlines()[0]}).") from None
