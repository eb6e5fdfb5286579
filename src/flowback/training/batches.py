"""The endless stream of training images, and everything random about it.

Order, mirroring, label drop, noise and its level depend only on the seed and the number of images seen. A
resumed run needs no generator state, and 1 or 8 processes see the same batches.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flowback.alignment.loss import alignment_weights
from flowback.config import RunConfig
from flowback.data.image_set import ImageSet, labelled
from flowback.devices import send
from flowback.errors import InputError
from flowback.flow.levels import levels_at
from flowback.flow.likelihood import dequantise

__all__ = ["Batch", "batches", "generator", "global_indices", "noticing_dead_workers"]

_ORDER, _STEP = 0, 1
"""Purposes of a generator, so that no two draws share a seed."""


def generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator seeded by all numbers of ``key``."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))


@lru_cache(maxsize=2)
def _order(seed: int, length: int, epoch: int) -> Tensor:
    """The permutation of an epoch; kept, since drawing one of a million images takes as long as a step."""
    return torch.randperm(length, generator=generator("cpu", seed, _ORDER, epoch))


def global_indices(seed: int, length: int, seen: int, count: int) -> Int64[Tensor, " b"]:
    """Images ``seen``, ``seen`` + 1, ... of the stream: one permutation of the set after another."""
    parts = []
    while count > 0:
        epoch, offset = divmod(seen, length)
        part = _order(seed, length, epoch)[offset : offset + count]
        parts.append(part)
        seen, count = seen + len(part), count - len(part)
    return torch.cat(parts)


@dataclass(frozen=True)
class Batch:
    """One process's share of a step."""

    indices: Int64[Tensor, " b"]
    """Which images of the set."""
    flipped: Bool[Tensor, " b"]
    """Mirrored left to right; on the CPU, as ``indices``."""
    clean: Float[Tensor, "b c h w"]
    """On [-1, 1], mirrored where `flipped`."""
    seen: Float[Tensor, "b c p q"]
    """What the encoder sees: `clean`, or the same images at another size."""
    noised: Float[Tensor, "b c h w"]
    """With the model's noise; what the flow sees."""
    labels: Int64[Tensor, " b"] | None
    drop: Bool[Tensor, " b"] | None
    """True where the label is replaced by the unconditional embedding."""
    chance: Float[Tensor, " b"] | None = None
    """Uniform on [0, 1), for what a student draws in a step; None in the training of a flow."""
    noise: Float[Tensor, "b c h w"] | None = None
    """Normal noise of a student that does not take the teacher's."""
    levels: Float[Tensor, " b"] | None = None
    """Noise levels, of a flow with a range of them."""
    alignment_weights: Float[Tensor, " b"] | None = None
    """Of the images in the alignment loss; None: all 1. They are those of the whole step: the mean over all
    its images is 1, or 0 if none of them is aligned."""


class _Reader(Dataset):
    """Reads a batch of images for the indices that the sampler yields.

    A bad image comes back as the error itself, which a worker would otherwise wrap in its traceback.
    """

    def __init__(self, images: ImageSet, originals: ImageSet | None) -> None:
        self.images, self.originals = images, originals

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | InputError:
        try:
            originals = None if self.originals is None else self.originals.read(indices)
            return indices, self.images.read_training(indices), originals
        except InputError as error:
            return error


class _Order:
    """Indices of each coming step, this process's slice of them."""

    def __init__(self, config: RunConfig, length: int, step: int, share: slice) -> None:
        self.config, self.length, self.step, self.share = config, length, step, share

    def __iter__(self) -> Iterator[Tensor]:
        train = self.config.train
        for step in range(self.step, train.steps):
            yield global_indices(train.seed, self.length, step * train.batch_size, train.batch_size)[
                self.share
            ]


def _leave_signals(worker: int) -> None:
    """A signal to the whole group is the training process's to answer: it still needs its workers."""
    del worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def noticing_dead_workers() -> Iterator[None]:
    """Say in one sentence that a worker died; PyTorch raises it wherever the training happens to be."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _worker_died(str(error)) from None


def _worker_died(error: str) -> InputError:
    return InputError(
        f"A process that decodes images died ({error.splitlines()[0].rstrip('. ')}); "
        "run the same command again to continue, with fewer --data.workers if memory ran out."
    )


def _items(loader: Iterable[Any]) -> Iterator[Any]:
    """What ``loader`` reads.

    A worker that dies while it hands a batch over breaks the connection before the signal of its death is
    seen. The sentence is raised outside the handler: an error in flight would keep the loader alive, and the
    signal would then be raised while the run is closed.
    """
    try:
        yield from loader
        return
    except ConnectionError as error:
        lost = f"DataLoader worker hung up: {error}"
    raise _worker_died(lost)


def batches(
    images: ImageSet,
    config: RunConfig,
    step: int,
    rank: int,
    processes: int,
    device: torch.device,
    originals: ImageSet | None = None,
) -> Generator[Batch, None, None]:
    """The batches of steps ``step``, ``step`` + 1, ... until the last, as one of ``processes`` sees them.

    ``originals`` are the same images as ``images``, of the size that the encoder sees.

    Raises:
        InputError: an image cannot be read.
    """
    train, model = config.train, config.model
    size = train.batch_size // processes
    share = slice(rank * size, (rank + 1) * size)
    workers = config.data.workers
    unlabelled = None
    if model.num_classes and config.data.labelled is not None:
        unlabelled = ~labelled(images, config.data.labelled)
    loader = DataLoader(
        _Reader(images, originals),
        batch_size=None,
        sampler=_Order(config, len(images), step, share),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals,
    )
    for offset, item in enumerate(_items(loader)):
        if isinstance(item, InputError):
            raise item
        indices, stored, larger = item
        # Draw for the whole batch and take the share: the same numbers for any number of processes.
        host = generator("cpu", train.seed, _STEP, step + offset)
        random = host if device.type == "cpu" else generator(device, train.seed, _STEP, step + offset)
        # On the CPU, where cached features are looked up: nobody waits for the device to say which.
        flipped = torch.rand(train.batch_size, generator=host)[share] < 0.5
        drop = torch.rand(train.batch_size, generator=random, device=device)[share] < train.label_drop
        shape = (train.batch_size, model.channels, model.image_size, model.image_size)
        if not config.data.flip:
            flipped = torch.zeros_like(flipped)
        normal = partial(_normal, shape, random, share)
        mirrored = send(flipped, device)
        clean = images.draw(stored, mirrored, normal)
        seen = clean if originals is None else originals.draw(larger, mirrored, normal)
        levels = weights = None
        if model.noise == "range":
            whole = levels_at(torch.rand(train.batch_size, generator=host), model, train)
            if config.student.active:  # it learns what the teacher draws from noise: its highest level
                whole = torch.full_like(whole, model.noise_max)
            levels, weights = send(whole[share], device), alignment_weights(whole, config.alignment)
            weights = None if weights is None else send(weights[share], device)
            noised = clean + levels[:, None, None, None] * normal()
        elif model.noise == "gaussian":
            noised = clean + model.noise_std * normal()
        else:
            noised = dequantise(clean, torch.rand(shape, generator=random, device=device)[share])
        labels = None
        if model.num_classes:
            assert images.labels is not None
            labels = send(images.labels[indices], device)
            if unlabelled is not None:
                drop = drop | send(unlabelled[indices], device)
        chance = noise = None
        if config.student.active:
            chance = torch.rand(train.batch_size, generator=random, device=device)[share]
            noise = normal() if config.student.coupling == "independent" else None
        drop_or_none = drop if labels is not None else None
        yield Batch(
            indices, flipped, clean, seen, noised, labels, drop_or_none, chance, noise, levels, weights
        )


def _normal(shape: tuple[int, ...], random: torch.Generator, share: slice) -> Tensor:
    """This process's share of standard normal values for the whole batch."""
    return torch.randn(shape, generator=random, device=random.device)[share]
