"""Processes started by ``torchrun`` or ``accelerate launch`` that share a job and merge their results.

Training has its own start-up (:mod:`flowback.training.distributed`), since its processes work in step.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from flowback.devices import pick_device
from flowback.errors import InputError

__all__ = ["Processes"]


class _Mergeable(Protocol):
    def merge(self, other: Any, /) -> Self:
        """This part and the one that follows."""
        ...


Part = TypeVar("Part", bound=_Mergeable)


class Processes:
    """All processes of a job; without a launcher, a single one.

    Args:
        device: as for the option ``--device``; ``auto`` gives each process its own GPU, if there are any.
        alone: ignore other processes; this one does the whole job.

    Raises:
        InputError: there is no such device, or several processes would share one.

    Example:
        >>> processes = Processes("cpu")
        >>> processes.share, processes.is_main
        ((0, 1), True)
    """

    def __init__(self, device: str = "auto", alone: bool = False) -> None:
        picked = pick_device(device, "--device")
        self.device: torch.device = picked
        """Device of this process."""
        self._index, self._count = 0, 1
        if alone:
            return
        self.state = PartialState(cpu=picked.type == "cpu")
        self._index, self._count = self.state.process_index, self.state.num_processes
        if picked.index is not None and self._count > 1:
            raise InputError(
                f"--device {device} is one device for {self._count} processes; "
                f"give {picked.type} or auto, and each takes its own."
            )
        if self._count > 1 and picked.type != "cpu":
            self.device = self.state.device

    @property
    def share(self) -> tuple[int, int]:
        """Index of this process, from 0, and number of processes."""
        return self._index, self._count

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self._index == 0

    def merged(self, part: Part) -> Part:
        """The parts of all processes, merged in their order; every process gets the result."""
        if self._count == 1:
            return part
        parts: list[Part] = gather_object([part])
        return functools.reduce(lambda a, b: a.merge(b), parts)

    def main_first(self) -> AbstractContextManager[None]:
        """A context whose body runs in the main process first, then in the others."""
        return nullcontext() if self._count == 1 else self.state.main_process_first()

    def close(self) -> None:
        """Wait for all, then end the group; a process that exits while its threads run is aborted."""
        if self._count > 1:
            self.state.wait_for_everyone()
            self.state.destroy_process_group()
