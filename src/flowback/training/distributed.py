"""Several processes as one run: how they start, stop together, notice a lost one, and share the weights.

Started by ``torchrun`` or ``accelerate launch``, each process finds the others through its environment; a
plain ``python`` is a run of one. Accelerate joins the gradients. Questions about the run itself go over a
group of their own on the CPU, so that nothing waits for a GPU.

Sharded training keeps a part of weights, gradients, optimiser and averages in each process. This is FSDP2,
PyTorch's ``fully_shard``, called directly: Accelerate's way to it leaves out the CPU, and chooses by class
what is gathered together, while our choice depends on the alignment (:func:`shard`). Every tensor is cut
along its first dimension, as a DTensor. Only this file knows of that: others hand it trees of tensors, and
plain tensors come back as they are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterable, Iterator
from datetime import timedelta
from types import FrameType
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn

from flowback.config import TrainConfig
from flowback.devices import pick_device
from flowback.errors import InputError, ProcessLostError
from flowback.training.distillation import StudentObjective
from flowback.training.objective import Objective

__all__ = [
    "Vote",
    "gathered",
    "held_bytes",
    "launcher_engine",
    "local",
    "noticing_loss",
    "root_whole",
    "scattered",
    "shard",
    "sharded",
    "signals",
    "start",
]

log = logging.getLogger("flowback")


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
        InputError: there is no such device, or several processes cannot train on it.
    """
    if (engine := launcher_engine()) not in (None, "FSDP2"):
        raise InputError(
            f"accelerate was configured for {engine}, which flowback does not train with; launch with "
            "--use_fsdp --fsdp_version 2, or with torchrun and --train.shard."
        )
    device = pick_device(train.device, "--train.device")
    # Accelerate joins processes on the CPU only where it is told to use it.
    cpu = device.type == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=train.timeout))
    if train.device != "auto" and device.type != state.device.type:
        raise InputError(
            f"--train.device {train.device} is not what the launcher chose, {state.device.type}; use auto."
        )
    if device.index is not None and state.num_processes > 1:
        raise InputError(
            f"--train.device {train.device} is one device for {state.num_processes} processes; "
            f"give {device.type} or auto, and each takes its own."
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what plain "cuda" means from here, in Accelerate too
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise InputError(
            f"{launched} processes were launched, but flowback cannot train on {state.device.type} with more "
            "than one; launch one process, or set --train.device cpu."
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

    def abandon(self) -> None:
        """Do not wait for the answer: this process stops now, whatever the others do."""
        self.pending = None

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
        known = getattr(distributed, "DistError", ())  # missing where PyTorch was built for one process
        lost = isinstance(error, known) or "gloo" in str(error) or "NCCL" in str(error)
        if state.num_processes == 1 or not lost:
            raise
        reason = str(error).splitlines()[0].rsplit("] ", 1)[-1]
        raise ProcessLostError(
            f"Process {state.process_index} of {state.num_processes} has lost another process ({reason})"
        ) from None


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step, and say at once what follows.

    A second Ctrl-C (SIGINT) raises KeyboardInterrupt. A second SIGTERM does not: schedulers repeat it.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            log.warning("%s: the run stops after this step and saves. Press Ctrl-C again to stop now.", name)
        asked.append(number)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread: leave signals to whoever runs us
            previous[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def sharded(train: TrainConfig, processes: int) -> bool:
    """Whether a run shards: by its option or by the launcher's, and there is more than one process."""
    return processes > 1 and (train.shard or launcher_engine() == "FSDP2")


def shard(objective: Objective | StudentObjective, device: torch.device) -> None:
    """Move each process's part of all weights to its device, and leave the rest.

    The Transformers that the objective names (of a flow: those of the blocks below the aligned ones) are
    gathered when they run, and let go after; in one that is deeper than others, each layer for itself. All
    else is gathered for the whole step.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    shallowest = min(len(body.layers) for body in objective.bodies)
    for body in objective.gathered_alone:
        # A deep block, gathered whole, would be most of the model: its layers come one by one.
        for unit in body.layers if len(body.layers) > shallowest else [body]:
            fully_shard(unit, mesh=mesh)
    fully_shard(objective, mesh=mesh)


@contextlib.contextmanager
def root_whole(objective: nn.Module) -> Iterator[None]:
    """Blocks of a sharded objective can be called one by one inside; a plain objective's always can."""
    if not hasattr(objective, "unshard"):
        yield
        return
    module = cast(Any, objective)
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def _is_sharded(value: Any) -> bool:
    """A DTensor, told without its import, which takes a plain run a second."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts; they share memory with the tensors."""
    return [cast(Any, tensor).to_local() if _is_sharded(tensor) else tensor for tensor in tensors]


def held_bytes(*tensors: Iterable[Tensor]) -> int:
    """Memory of this process's parts."""
    return sum(part.numel() * part.element_size() for group in tensors for part in local(group))


@torch.no_grad()
def gathered(tree: Any, keep: bool = True, device: torch.device | None = None) -> Any:
    """Nested dicts and lists with their sharded tensors made whole, one after the other.

    All processes must call it.

    Args:
        tree: a state dict, or several.
        keep: False helps the other processes, and gets None for each tensor.
        device: copies of all tensors go there, which share nothing with the tree; None leaves those that were
            never sharded as they are.
    """
    if isinstance(tree, dict):
        return {name: gathered(value, keep, device) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value, keep, device) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    whole = cast(Any, tree).full_tensor() if _is_sharded(tree) else tree
    if not keep or device is None:
        return whole if keep else None
    return whole.detach().to(device, copy=whole is tree)  # what was gathered is a copy already


def scattered(tree: Any, like: Any) -> Any:
    """What :func:`gathered` undoes: whole tensors cut as those of ``like`` with the same shape.

    Args:
        tree: nested dicts; every process has all of them.
        like: the same dicts, or a tensor that stands for all below it.
    """
    if isinstance(tree, dict):
        return {
            name: scattered(value, like.get(name) if isinstance(like, dict) else like)
            for name, value in tree.items()
        }
    if not isinstance(tree, Tensor) or not _is_sharded(like) or tree.shape != like.shape:
        return tree
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tree.to(like.device), like.device_mesh, like.placements)
