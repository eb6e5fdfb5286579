"""Several processes as one run: how they start, stop together, and notice that one of them is gone.

Started by ``torchrun`` or ``accelerate launch``, each process finds the others through its environment; a
plain ``python`` is a run of one. Gradients meet in Accelerate. Questions about the run itself, which need
no device, go over a group of their own on the CPU, so that nothing waits for a GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed

from flowback.config import TrainConfig
from flowback.errors import InputError, ProcessLostError

__all__ = ["Vote", "launcher_engine", "noticing_loss", "signals", "start"]


def launcher_engine() -> str | None:
    """What ``accelerate launch`` was told to join gradients with; None: nothing in particular."""
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{engine}"):
            return engine
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "FSDP" + os.environ.get("FSDP_VERSION", "1")
    return None


def start(train: TrainConfig) -> PartialState:
    """This process and the others of its run; joins their group at the first call.

    Raises:
        InputError: the device that was asked for is not there, or takes no several processes.
    """
    if (engine := launcher_engine()) not in (None, "FSDP2"):
        raise InputError(
            f"accelerate was configured for {engine}, which flowback does not train with; launch with "
            "--use_fsdp --fsdp_version 2, or with torchrun and --train.shard."
        )
    there = torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()
    # Accelerate joins processes on the CPU only where it is told to use it.
    cpu = train.device == "cpu" or (train.device == "auto" and not there)
    state = PartialState(
        cpu=cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(seconds=train.timeout)
    )
    if train.device.split(":")[0] not in ("auto", state.device.type):
        raise InputError(
            f"--train.device {train.device} is not there: this machine has {state.device.type}; use auto."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise InputError(
            f"{launched} processes were launched, and {state.device.type} takes part in none but its own; "
            "launch one, or set --train.device cpu."
        )
    return state


class Vote:
    """Whether any process raised its flag, asked at every step and answered one step later.

    The answer to a question has arrived by the time the next one is asked, so nobody waits for it, and all
    processes get the same answer at the same step.
    """

    def __init__(self, state: PartialState, timeout: float) -> None:
        self.group: distributed.ProcessGroup | None = None
        if state.num_processes > 1:
            group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self.group = cast(distributed.ProcessGroup, group)
        self.pending: tuple[Any, torch.Tensor] | None = None

    def __call__(self, flag: bool) -> bool:
        """Ask again; with one process the answer is the flag itself."""
        if self.group is None:
            return flag
        ballot = torch.tensor([float(flag)])
        work = distributed.all_reduce(ballot, group=self.group, async_op=True)
        answer, self.pending = self.close(), (work, ballot)
        return answer

    def close(self) -> bool:
        """The answer to the last question; none may be open when the group is closed."""
        if self.pending is None:
            return False
        (work, ballot), self.pending = self.pending, None
        work.wait()
        return bool(ballot > 0)


@contextlib.contextmanager
def noticing_loss(state: PartialState) -> Iterator[None]:
    """Turn what the communication libraries say of a lost process into one sentence."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, distributed.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if state.num_processes == 1 or not lost:
            raise
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1]
        raise ProcessLostError(
            f"Process {state.process_index} of {state.num_processes} has lost another one ({reason})"
        ) from None


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step."""
    asked: list[int] = []
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread: leave signals to whoever runs us
            previous[number] = signal.signal(number, lambda received, _: asked.append(received))
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
