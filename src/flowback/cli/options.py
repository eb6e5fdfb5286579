"""Options that several verbs share, and what they come to: data, device, processes, sampler."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, get_args, get_type_hints

import torch
import tyro
from accelerate import PartialState
from accelerate.utils import gather_object

from flowback import checkpoint
from flowback import checkpoint as checkpoints
from flowback.config import DataConfig, ModelConfig
from flowback.data.image_set import ImageSet
from flowback.data.load import load_images
from flowback.errors import InputError
from flowback.model import Flow
from flowback.sampling import BlockPlan
from flowback.sampling.block_plan import load_plan, plan_file, wanted

__all__ = [
    "Precision",
    "Processes",
    "Sampler",
    "choose",
    "held_out",
    "is_checkpoint",
    "out_folder",
    "parse",
    "pick_device",
]

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


Sampler = Literal["auto", "sequential", "jacobi"]


Precision = Literal["fp32", "bf16"]


def choose(
    flow: Flow,
    checkpoint: Path,
    sampler: Sampler,
    tolerance: float,
    window: int,
    batch_size: int,
    precision: Precision,
    guidance: float,
) -> tuple[tuple[BlockPlan, ...] | None, str | None]:
    """A plan for each block, None for sequential, and what to tell the user about it.

    ``auto`` takes the checkpoint's plan where it was measured for such sampling on this device.
    """
    if sampler == "jacobi":
        every = BlockPlan(min(window, flow.config.tokens), "z", tolerance)
        return (every,) * flow.config.blocks, None
    if sampler == "sequential":
        return None, None
    folder = checkpoints.resolve(checkpoint)
    if not plan_file(folder).is_file():
        return None, f"Sequential: {checkpoint} has no plan; `flowback plan` makes one."
    plan = load_plan(plan_file(folder))
    misfit = plan.misfit(wanted(folder, flow, batch_size, precision, guidance, tolerance))
    if misfit:
        return None, f"Sequential: the plan does not fit, {misfit}; `flowback plan` makes one that does."
    swept = sum(block.window > 1 for block in plan.blocks)
    return plan.blocks, f"Planned: {swept} of {len(plan.blocks)} blocks by Jacobi sweeps."


class _Mergeable(Protocol):
    def merge(self, other: Any, /) -> Self:
        """This part and the one that follows."""
        ...


Part = TypeVar("Part", bound=_Mergeable)


class Processes:
    """All processes of the command; a single one without a launcher.

    Args:
        device: as the option ``--device``; ``auto`` gives each process its own GPU, if there are any.

    Raises:
        InputError: no such device here.
    """

    def __init__(self, device: str) -> None:
        self.state = PartialState(cpu=device == "cpu")
        self.device: torch.device = self.state.device if device == "auto" else pick_device(device)

    @property
    def share(self) -> tuple[int, int]:
        """Number of this process, from 0, and of all of them."""
        return self.state.process_index, self.state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process talks to the user and writes."""
        return self.state.is_main_process

    def merged(self, part: Part) -> Part:
        """The parts of all processes together, in their order; every process gets it."""
        if self.state.num_processes == 1:
            return part
        parts: list[Part] = gather_object([part])
        return functools.reduce(lambda a, b: a.merge(b), parts)

    def main_first(self) -> AbstractContextManager[None]:
        """What stands inside is done by the main process first, then by the others."""
        return self.state.main_process_first()

    def close(self) -> None:
        """Wait for all, then end the group: a process that exits under its threads is aborted."""
        self.state.wait_for_everyone()
        self.state.destroy_process_group()
