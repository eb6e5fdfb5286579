"""Held-out images: their likelihood with its uncertainty, and how well the flow classifies them.

nll           nats per dimension of images with the model's training noise: what training minimises
bits_per_dim  bits per dimension of the 8-bit images, an upper bound by uniform dequantisation
              (Theis et al., arXiv 1511.01844), whatever noise the model was trained with
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flowback.classification import Method, classify
from flowback.data.image_set import ImageSet, evenly, in_batches
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError
from flowback.flow.likelihood import add_noise, bits_per_dim, nll_per_dim
from flowback.model import Flow
from flowback.progress import track

__all__ = ["Accuracy", "Estimate", "Likelihood", "held_out_figures", "likelihood", "topk_accuracy"]


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


@dataclass(frozen=True)
class Accuracy:
    """Classification of a labelled data set."""

    method: Method
    images: int
    """Images classified."""
    right1: int
    """Images whose class has the largest score."""
    right5: int
    """Images whose class is among the five largest scores."""
    confusion: Int[Tensor, "k k"]
    """Images of the row's class that were called the column's class."""
    nonfinite: int
    """Images with scores that are not finite; they count as wrong and are left out of ``confusion``."""
    seconds: float

    def merge(self, other: Accuracy) -> Accuracy:
        """Both sets together, classified at the same time."""
        return Accuracy(
            self.method,
            self.images + other.images,
            self.right1 + other.right1,
            self.right5 + other.right5,
            self.confusion + other.confusion,
            self.nonfinite + other.nonfinite,
            max(self.seconds, other.seconds),
        )

    @property
    def top1(self) -> float:
        """Share of images whose class has the largest score."""
        return self.right1 / self.images

    @property
    def top5(self) -> float:
        """Share of images whose class is among the five largest scores."""
        return self.right5 / self.images

    @property
    def images_per_second(self) -> float:
        """Speed, with reading and noising."""
        return self.images / self.seconds

    @property
    def per_class(self) -> Float[Tensor, " k"]:
        """Share of each class's images that were called so; NaN for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(dim=1)


def topk_accuracy(
    flow: Flow,
    images: ImageSet,
    method: Method = "gradient",
    limit: int | None = None,
    batch_size: int = 64,
    noise: bool = True,
    draws: int = 1,
    seed: int = 0,
    steps: int = 1,
    step_size: float = 1.0,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Accuracy:
    """Classify a data set, batch by batch.

    Image i gets the noise of seed ``seed + i``, so the batch size changes nothing.

    Args:
        flow: a class-conditional flow.
        images: labelled images.
        method: the rule.
        limit: take only so many images, spread evenly over the set.
        batch_size: images at once.
        noise: add the model's training noise.
        draws: draws of the noise to average over.
        seed: of the noise.
        steps: of gradient ascent.
        step_size: of each step.
        share: (r, p) takes part r, from 0, of the images in p parts; merge the results.
        progress: show a bar.

    Raises:
        InputError: images without labels, or of other classes than the model's.
    """
    if images.labels is None:
        raise InputError(
            f"{images.name} has no labels; to measure accuracy give images sorted into class folders."
        )
    classes = flow.config.num_classes or 0
    if classes and classes != len(images.classes):
        raise InputError(f"{images.name} has {len(images.classes)} classes, the model {classes}.")
    chosen = evenly(len(images), limit, share)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    right1 = right5 = nonfinite = 0
    batches = in_batches(chosen, batch_size)
    start = time.perf_counter()
    for index in track(batches, len(batches), f"classify ({method})", "batches") if progress else batches:
        batch = to_unit_range(images.read(index))
        seeds = (seed + index).tolist()
        scores = classify(flow, batch, method, noise, draws, seeds, steps, step_size).cpu()
        finite = scores.isfinite().all(dim=1)
        nonfinite += int((~finite).sum())
        truth, ranked = images.labels[index][finite], scores[finite].topk(min(5, classes), dim=1).indices
        hit = ranked == truth[:, None]
        right1 += int(hit[:, 0].sum())
        right5 += int(hit.any(dim=1).sum())
        confusion += torch.bincount(truth * classes + ranked[:, 0], minlength=classes**2).view(
            classes, classes
        )
    seconds = time.perf_counter() - start
    return Accuracy(method, len(chosen), right1, right5, confusion, nonfinite, seconds)


CHUNK = 256
"""Images evaluated at once."""


def held_out_figures(flow: Flow, images: ImageSet, limit: int, exhaustive: bool = False) -> dict[str, float]:
    """Mean nll of the noised images given their labels, and the accuracy of training-free classification.

    Args:
        flow: in eval mode.
        images: the test set; noise is seeded by an image's index.
        limit: the first so many images.
        exhaustive: also classify with one pass for every class.

    Returns:
        ``nll`` in nats per dimension; ``top1_gradient`` and ``top1_exhaustive`` as shares, with classes.
    """
    count = min(limit, len(images))
    sums: dict[str, float] = {}
    for start in range(0, count, CHUNK):
        indices = torch.arange(start, min(start + CHUNK, count))
        pixels = to_unit_range(images.read(indices)).to(flow.device)
        seeds = indices.tolist()
        labels = (
            images.labels[indices].to(flow.device)
            if flow.config.num_classes and images.labels is not None
            else None
        )
        with torch.no_grad():
            log_prob = flow(add_noise(pixels, flow.config, seeds), labels).log_prob
        found = {"nll": float(nll_per_dim(log_prob, flow.config.dims).sum())}
        if labels is not None:
            for method in ("gradient", "exhaustive") if exhaustive else ("gradient",):
                scores = classify(flow, pixels, method=method, seeds=seeds)
                found[f"top1_{method}"] = float((scores.argmax(1) == labels).sum())
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value
    return {name: value / count for name, value in sums.items()}
