"""Likelihood of held-out images, with its uncertainty.

nll           nats per dimension of images with the model's training noise: what training minimises
bits_per_dim  bits per dimension of the 8-bit images, an upper bound by uniform dequantisation
              (Theis et al., arXiv 1511.01844), whatever noise the model was trained with
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.data.images import ImageSet
from flowback.data.subset import evenly, in_batches
from flowback.errors import InputError
from flowback.flow import Flow
from flowback.flow.likelihood import bits_per_dim, nll_per_dim, to_unit_range
from flowback.flow.noise import add_noise
from flowback.progress import track

__all__ = ["Estimate", "Likelihood", "likelihood"]


@dataclass(frozen=True)
class Estimate:
    """A mean over images and draws of the noise."""

    mean: float
    error: float
    """Standard error over the images, each averaged over its draws."""
    draw_error: float | None
    """Standard error from the noise alone; None with a single draw."""

    @classmethod
    def of(cls, values: Float[Tensor, "draws n"]) -> Estimate:
        """From the value of each image under each draw."""
        draws, count = values.shape
        values = values.double()
        error = float(values.mean(dim=0).std() / math.sqrt(count)) if count > 1 else math.nan
        within = float(values.var(dim=0).mean() / (draws * count)) ** 0.5 if draws > 1 else None
        return cls(float(values.mean()), error, within)


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of a set of images."""

    conditional: bool
    """Whether each image's own label was given to the model."""
    nll_values: Float[Tensor, "draws n"]
    """Nats per dimension on the [-1, 1] scale, of each image with the training noise."""
    bits_values: Float[Tensor, "draws n"]
    """Bits per dimension of each image's 8-bit values, by uniform dequantisation."""

    def merge(self, other: Likelihood) -> Likelihood:
        """Both sets together."""
        nll = torch.cat([self.nll_values, other.nll_values], dim=1)
        return Likelihood(self.conditional, nll, torch.cat([self.bits_values, other.bits_values], dim=1))

    @property
    def nll(self) -> Estimate:
        """Mean nats per dimension."""
        return Estimate.of(self.nll_values)

    @property
    def bits_per_dim(self) -> Estimate:
        """Mean bits per dimension."""
        return Estimate.of(self.bits_values)


@torch.no_grad()
def likelihood(
    flow: Flow,
    images: ImageSet,
    draws: int = 3,
    seed: int = 0,
    conditional: bool = True,
    limit: int | None = None,
    batch_size: int = 64,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Likelihood:
    """Mean negative log-likelihood, streamed; image i gets the noise of seed ``seed + i``.

    Args:
        flow: the model.
        images: held-out images.
        draws: draws of the noise for each image.
        seed: of the noise.
        conditional: give each image its label, where model and set have labels.
        limit: take only so many images, spread evenly over the set.
        batch_size: images at once.
        share: (r, p) takes part r, from 0, of the images in p parts; merge the results.
        progress: show a bar.

    Raises:
        InputError: no draws.
    """
    if draws < 1:
        raise InputError("--draws must be at least 1.")
    conditional = conditional and bool(flow.config.num_classes) and images.labels is not None
    dequantising = replace(flow.config, noise="uniform")
    chosen = evenly(len(images), limit, share)
    values = torch.zeros(2, draws, len(chosen), dtype=torch.float64)
    parts, done = in_batches(chosen, batch_size), 0
    for index in track(parts, len(parts), "likelihood", "batches") if progress else parts:
        clean = to_unit_range(images.read(index)).to(flow.device, flow.dtype)
        labels = images.labels[index] if conditional and images.labels is not None else None
        seeds = (seed + index).tolist()
        for number, config in enumerate((flow.config, dequantising)):
            for draw in range(draws):
                log_prob = flow.log_prob(add_noise(clean, config, seeds, draw), labels)
                values[number, draw, done : done + len(index)] = log_prob.cpu()
        done += len(index)
    dims = flow.config.dims
    return Likelihood(conditional, nll_per_dim(values[0], dims), bits_per_dim(values[1], dims))
