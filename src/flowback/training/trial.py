"""What a run will take: its images are opened, one step is tried, and nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from flowback.alignment.encoders import Encoder, create_encoder
from flowback.alignment.targets import without_table
from flowback.config import RunConfig
from flowback.data.image_set import AnyImages, ImageSet
from flowback.devices import pick_device
from flowback.flow.cost import flops_per_image, training_bytes
from flowback.training.loop import check_fit
from flowback.training.objective import Objective
from flowback.training.run import open_images
from flowback.training.state import set_up_bodies

__all__ = ["Trial", "try_run"]

_FLOPS = 2e11
"""Most operations of a step that is tried on a CPU: seconds on one core. A GPU takes 100 times as many."""


@dataclass(frozen=True)
class Trial:
    """What a run finds and takes."""

    config: RunConfig
    """All settings, completed from the images."""
    images: ImageSet
    test: ImageSet | None
    memory: int
    """Bytes of one process, estimated: program, weights, optimiser, average and one step's activations."""
    step_seconds: float | None
    """Of one step of this process alone, from a part of a batch; None where that is too large to be tried."""
    encoder_seconds: float
    """To encode, before the first step, all images and their mirror images; 0 without such a table."""

    @property
    def seconds(self) -> float | None:
        """Of the whole run, without evaluations, samples and checkpoints."""
        if self.step_seconds is None:
            return None
        return self.encoder_seconds + self.config.train.steps * self.step_seconds


def try_run(config: RunConfig, images: AnyImages | None = None, test: AnyImages | None = None) -> Trial:
    """Open the images of a run and try one step: what ``flowback train --dry-run`` does.

    Args:
        config: the settings.
        images: the training images; None loads those that ``config.data`` names, each of which is read where
            the set fits in memory.
        test: held-out images.

    Raises:
        InputError: what :func:`flowback.train` would refuse about images and encoder.

    Example:
        >>> import flowback
        >>> trial = try_run(flowback.get_preset("digits-mini").config)
        >>> len(trial.images), trial.seconds > 0
        (1437, True)
    """
    config, images, test = open_images(config, images, test)
    check_fit(config, images)
    device = pick_device(config.train.device)
    encoder = None
    if config.alignment.active:
        encoder = create_encoder(config.alignment.encoder, config.alignment.weights).to(device)
    share = config.train.micro_batch or config.train.batch_size
    train = config.train
    memory = training_bytes(config.model, share, train.precision, train.checkpoint_activations)
    if device.type == "cpu":
        memory += _resident()
    most = int(_FLOPS * (1 if device.type == "cpu" else 100) / (3 * flops_per_image(config.model)))
    held = training_bytes(config.model, 1, config.train.precision)
    if not most or (device.type == "cpu" and held > psutil.virtual_memory().available):
        return Trial(config, images, test, memory, None, 0.0)
    step, encode = _timed(config, min(most, share, len(images)), encoder, device)
    table = encoder is not None and without_table(config, len(images), encoder.dim) is None
    batch, rows = config.train.batch_size, (2 if config.data.flip else 1) * len(images)
    whole = batch * (step if table else step + encode)
    return Trial(config, images, test, memory, whole, rows * encode if table else 0.0)


def _resident() -> int:
    """Bytes of the program, the images and the encoder, with the libraries that every optimiser loads."""
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # torch's compiler, 0.15 GiB
    return psutil.Process().memory_info().rss


def _timed(
    config: RunConfig, count: int, encoder: Encoder | None, device: torch.device
) -> tuple[float, float]:
    """Seconds for one of ``count`` images in a step, and in the encoder; each after one that is not timed."""
    torch.manual_seed(config.train.seed)
    objective = Objective(config, encoder.dim if encoder is not None else None).to(device)
    set_up_bodies(objective.bodies, replace(config, train=replace(config.train, compile=False)))
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-9, fused=True)
    model, grid = config.model, config.alignment.grid or config.model.grid
    noised = torch.randn(count, model.channels, model.image_size, model.image_size, device=device)
    labels = torch.zeros(count, dtype=torch.int64, device=device) if model.num_classes else None
    levels = torch.full((count,), model.noise_max, device=device) if model.noise == "range" else None
    targets = None if encoder is None else torch.randn(count, grid**2, encoder.dim, device=device)

    def step() -> None:
        objective(noised, labels, None, targets, levels=levels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def encode() -> None:
        if encoder is not None:
            encoder(noised[:, :3].clamp(-1, 1) if model.channels in (1, 3) else _colours(noised), grid)

    times = []
    for part in (step, encode):
        part()
        _wait(device)
        started = time.perf_counter()
        part()
        _wait(device)
        times.append((time.perf_counter() - started) / count)
    return times[0], times[1]


def _colours(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
    """Pictures of the latents' size, in place of those that the encoder sees."""
    return latents[:, :1].clamp(-1, 1).expand(-1, 3, -1, -1)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
