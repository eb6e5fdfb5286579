"""Sharded training: weights, gradients, optimiser and averages in parts, one part in each process.

This is FSDP2, PyTorch's ``fully_shard``, called directly: Accelerate's way to it leaves out the CPU, and
chooses by class what is gathered together, while our choice depends on the alignment (:func:`shard`).

Every tensor is cut along its first dimension, as a DTensor. This file alone knows of that: others hand it
trees of tensors, and plain ones come back as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowback.config import TrainConfig
from flowback.training.objective import Objective
from flowback.training.processes import launcher_engine

__all__ = ["gathered", "held_bytes", "local", "root_whole", "scattered", "shard", "sharded"]


def sharded(train: TrainConfig, processes: int) -> bool:
    """Whether a run shards: by its option or by the launcher's, and there is more than one process."""
    return processes > 1 and (train.shard or launcher_engine() == "FSDP2")


def shard(objective: Objective, device: torch.device) -> None:
    """Move each process's part of all weights to its device, and leave the rest.

    The Transformer of a block below the aligned ones is gathered when it runs, and let go after. All else
    is gathered for the whole step: the blocks from the lowest aligned one on, the projector, and the small
    layers around the Transformers. The backward pass of the aligned blocks goes over their graphs several
    times (:mod:`flowback.alignment.strategies`), and FSDP2 would take the first time for the last.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    config, blocks = objective.config.alignment, list(objective.flow.blocks)
    if objective.projector is not None and config.strategy != "forward":
        blocks = blocks[: min(block for block, _ in config.locations) - 1]
    for block in blocks:
        fully_shard(block.body, mesh=mesh)
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
        keep: False takes part and gets None for each tensor.
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
