"""The processes that share a verb's work, under `torchrun` or `accelerate launch`."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from flowback.cli.subject import pick_device

__all__ = ["Processes"]


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
