"""Held-out images: their likelihood with its uncertainty, and how well the flow classifies them.

nll           nats per dimension of images with the model's training noise: what training minimises; for a
              flow with a range of noise levels, at one of them
bits_per_dim  bits per dimension of the 8-bit images, an upper bound by uniform dequantisation
              (Theis et al., arXiv 1511.01844), whatever noise the model was trained with

All of it goes through :func:`held_out_batches`, the one loop over held-out images.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from flowback.classification import Method, classify, embedding_distances
from flowback.config import DataConfig, ModelConfig
from flowback.data.image_set import AnyImages, ImageSet, as_image_set, evenly, in_batches, match_classes
from flowback.data.load import load_images
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError
from flowback.flow.likelihood import add_noise, bits_per_dim, nll_per_dim
from flowback.model import Flow
from flowback.named_model import NamedModel
from flowback.progress import track

__all__ = [
    "Accuracy",
    "Estimate",
    "HeldOutBatch",
    "Likelihood",
    "LoopOptions",
    "accuracy",
    "default_methods",
    "held_out_batches",
    "held_out_figures",
    "likelihood",
    "log_densities",
    "matched",
    "run_images",
    "with_labels",
]


log = logging.getLogger("flowback")

_METHODS: tuple[Method, ...] = ("gradient", "normalised", "exhaustive")


_FEW_CLASSES = 20


def default_methods(flow: Flow) -> tuple[Method, ...]:
    """The rules of classification that are worth their time: the exhaustive one too, up to 20 classes."""
    few = (flow.config.num_classes or 0) <= _FEW_CLASSES
    return _METHODS if few else _METHODS[:2]


class LoopOptions(TypedDict, total=False):
    """Options of :func:`held_out_batches`, which everything that loops over held-out images takes too."""

    limit: int | None
    """Use only this many images, spread evenly over the set; None (the default) uses all."""
    seed: int
    """Of the noise: image i gets ``seed + i``, so that the batch size changes nothing. By default 0."""
    batch_size: int
    """Images at once; by default 64."""
    share: tuple[int, int]
    """(r, p) takes part r, from 0, of the images in p parts; the results merge. By default all: (0, 1)."""
    progress: bool
    """Show a bar; by default False."""
    level: float | None
    """Noise level of the images, for a flow with a range of them; by default the geometric middle."""


class HeldOutBatch(NamedTuple):
    """Some held-out images, ready for the flow."""

    images: Float[Tensor, "b c h w"]
    """Clean, on [-1, 1], with the flow's device and dtype."""
    labels: Int64[Tensor, " b"] | None
    """Ids of the model's classes, on the flow's device; None for an unconditional model, or no labels."""
    seeds: list[int]
    """Of each image's noise."""
    levels: Float[Tensor, " b"] | None = None
    """Noise levels, for a flow with a range of them."""

    @property
    def level(self) -> float | Literal[True]:
        """The level for :func:`flowback.classify`; True: the flow's only one."""
        return True if self.levels is None else float(self.levels[0])

    def noised(self, config: ModelConfig, draw: int = 0) -> Float[Tensor, "b c h w"]:
        """The images with the training noise of ``config``; each draw has its own."""
        return add_noise(self.images, config, self.seeds, draw, self.levels)


def run_images(flow: NamedModel, split: Literal["train", "test"], data: DataConfig | None = None) -> ImageSet:
    """The training or test images of a data set, by default of the run that the flow comes from.

    The log says which data these are, if it is the run that names them.

    Raises:
        InputError: a flow without a run, and no data set; or a run that names none.
    """
    own = flow.run.data if flow.run is not None else None
    data = data or own
    if data is None:
        raise InputError(f"The flow does not come from a run: give its {split} images, or a DataConfig.")
    images = load_images(data, flow.config.image_size, flow.config.channels, split)
    if data == own:
        log.info(
            "The %s images are the %s of %s, as the model's settings say; --data takes others.",
            *(split, f"{len(images):,}", data.path or data.name),
        )
    return images


def matched(flow: NamedModel, images: AnyImages) -> ImageSet:
    """The images with labels that are the model's class ids.

    Classes go by their names where the model knows them, and otherwise by their order.

    Raises:
        InputError: classes that the model does not have.
    """
    images, count = as_image_set(images), flow.config.num_classes or 0
    if not count or images.labels is None:
        return images
    if flow.classes:
        return match_classes(images, flow.classes)
    if len(images.classes) != count:
        raise InputError(
            f"{images.name} has {len(images.classes)} classes, the model {count}; "
            "give the data it was trained on."
        )
    return images


def held_out_batches(
    flow: Flow,
    images: ImageSet,
    description: str = "held-out images",
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
    level: float | None = None,
) -> Iterator[HeldOutBatch]:
    """Go through held-out images, batch by batch.

    Args:
        flow: the model.
        images: the set, with the model's classes.
        description: what the bar says.
        limit: see :class:`LoopOptions`, as for all that follow.
        seed: of the noise.
        batch_size: images at once.
        share: of the images.
        progress: show a bar.
        level: of the noise.

    Raises:
        InputError: a noise level that the flow does not have.
    """
    if level is None:
        level = flow.config.noise_level if flow.config.noise == "range" else None
    labels = images.labels if flow.config.num_classes else None
    parts = in_batches(evenly(len(images), limit, share), batch_size)
    for index in track(parts, len(parts), description, "batches") if progress else parts:
        clean = to_unit_range(images.read(index)).to(flow.device, flow.data_dtype)
        batch_labels = None if labels is None else labels[index].to(flow.device)
        levels = flow.levels(level, len(index))
        yield HeldOutBatch(clean, batch_labels, (seed + index).tolist(), levels)


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


def likelihood(
    flow: Flow, images: AnyImages, draws: int = 3, conditional: bool = True, **loop: Unpack[LoopOptions]
) -> Likelihood:
    """Mean negative log-likelihood of held-out images.

    Args:
        flow: the model.
        images: held-out images.
        draws: draws of the noise for each image.
        conditional: give each image its label, where model and set have labels.
        **loop: which images, in which batches, with which noise: see :class:`LoopOptions`.

    Raises:
        InputError: no draws, or images of other classes than the model's.

    Example:
        >>> import flowback
        >>> from flowback.data.load import load_images
        >>> flow = flowback.create_flow("digits-mini", num_classes=10)
        >>> test = load_images(flowback.DataConfig("digits"), image_size=8, channels=1, split="test")
        >>> found = likelihood(flow, test, draws=2, limit=20)
        >>> found.nll_values.shape, found.nll.mean > 0
        (torch.Size([2, 20]), True)
    """
    if draws < 1:
        raise InputError("--draws must be at least 1.")
    images = matched(flow, images)
    conditional = conditional and bool(flow.config.num_classes) and images.labels is not None
    parts: list[list[Tensor]] = [[torch.zeros(draws, 0, dtype=torch.float64)] for _ in range(2)]
    for batch in held_out_batches(flow, images, "likelihood", **loop):
        for log_probs, dequantised in zip(parts, (False, True), strict=True):
            log_probs.append(log_densities(flow, batch, dequantised, draws, conditional))
    (noised, eight_bit), dims = (torch.cat(log_probs, dim=1) for log_probs in parts), flow.config.dims
    return Likelihood(conditional, nll_per_dim(noised, dims), bits_per_dim(eight_bit, dims))


@torch.no_grad()
def log_densities(
    flow: Flow, batch: HeldOutBatch, dequantised: bool = False, draws: int = 1, conditional: bool = True
) -> Float[Tensor, "draws b"]:
    """Log-densities in nats, in float64 on the CPU.

    Args:
        flow: the model.
        batch: the images.
        dequantised: of 8-bit values with uniform noise, for which a flow with a range of levels is asked at
            its lowest; else of images with the training noise.
        draws: of the noise.
        conditional: given the labels.
    """
    config, noise, labels = flow.config, batch.levels, batch.labels if conditional else None
    if dequantised:
        noise = None if noise is None else torch.full_like(noise, config.noise_min)
        config = replace(config, noise="uniform")
    rows = [
        flow.log_prob(batch.noised(config, draw), labels, noise=noise).cpu().double() for draw in range(draws)
    ]
    return torch.stack(rows)


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
    """Images of the row's class that were classified as the column's class."""
    nonfinite: int
    """Images with scores that are not finite; they count as wrong and are left out of ``confusion``."""
    seconds: float

    @classmethod
    def none(cls, method: Method, classes: int) -> Accuracy:
        """Of no images, to which others are merged."""
        return cls(method, 0, 0, 0, torch.zeros(classes, classes, dtype=torch.int64), 0, 0.0)

    @classmethod
    def of(cls, method: Method, scores: Float[Tensor, "b k"], labels: Int64[Tensor, " b"]) -> Accuracy:
        """Of some images, by the scores of every class; its seconds are 0."""
        classes = scores.shape[1]
        finite = scores.isfinite().all(dim=1)
        hits, truth = _hits(scores, labels), labels[finite].cpu()
        called = scores[finite].argmax(dim=1).cpu()
        confusion = torch.bincount(truth * classes + called, minlength=classes**2).view(classes, classes)
        right1, right5 = int(hits[:, 0].sum()), int(hits.any(dim=1).sum())
        return cls(method, len(hits), right1, right5, confusion, int((~finite).sum()), 0.0)

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
    def per_class(self) -> tuple[float | None, ...]:
        """Share of each class's images that were classified correctly; None for a class without images."""
        counts = self.confusion.sum(dim=1).tolist()
        right = self.confusion.diagonal().tolist()
        return tuple(correct / count if count else None for correct, count in zip(right, counts, strict=True))


def accuracy(
    flow: Flow,
    images: AnyImages,
    method: Method = "gradient",
    *,
    noise: bool = True,
    draws: int = 1,
    steps: int = 1,
    step_size: float = 1.0,
    **loop: Unpack[LoopOptions],
) -> Accuracy:
    """Classify a data set with :func:`flowback.classify`, batch by batch, and count.

    Args:
        flow: a class-conditional flow.
        images: labelled images; their classes are matched with the model's by name.
        method: the rule.
        noise: add the model's training noise.
        draws: draws of the noise to average over.
        steps: of gradient ascent.
        step_size: of each step.
        **loop: which images, in which batches, with which noise: see :class:`LoopOptions`.

    Raises:
        InputError: images without labels, or of other classes than the model's.

    Example:
        >>> import flowback
        >>> from flowback.data.load import load_images
        >>> flow = flowback.create_flow("digits-mini", num_classes=10)
        >>> test = load_images(flowback.DataConfig("digits"), image_size=8, channels=1, split="test")
        >>> result = flowback.accuracy(flow, test, limit=20)
        >>> result.images, result.confusion.shape, result.top1 <= result.top5
        (20, torch.Size([10, 10]), True)
    """
    images, start = with_labels(flow, images), time.perf_counter()
    total = Accuracy.none(method, flow.config.num_classes or 0)
    for batch in held_out_batches(flow, images, f"classify ({method})", **loop):
        level = batch.level if noise else False
        scores = classify(flow, batch.images, method, level, draws, batch.seeds, steps, step_size)
        assert batch.labels is not None
        total = total.merge(Accuracy.of(method, scores, batch.labels))
    return replace(total, seconds=time.perf_counter() - start)


def with_labels(flow: Flow, images: AnyImages) -> ImageSet:
    """The images with labels that are the model's class ids.

    Raises:
        InputError: images without labels, or of other classes than the model's.
    """
    images = matched(flow, images)
    if images.labels is None:
        raise InputError(
            f"{images.name} has no labels; to measure accuracy give images sorted into class folders."
        )
    return images


def _hits(scores: Float[Tensor, "b k"], labels: Int64[Tensor, " b"]) -> Bool[Tensor, "b r"]:
    """Whether the label has the largest score, the second, ... the fifth; not where any is not finite."""
    ranked = scores.topk(min(5, scores.shape[1]), dim=1).indices
    return (ranked == labels[:, None]) & scores.isfinite().all(dim=1, keepdim=True)


_TOGETHER = 256
"""Images in a batch of :func:`held_out_figures`."""


def held_out_figures(flow: Flow, images: ImageSet, limit: int, exhaustive: bool = False) -> dict[str, float]:
    """Mean nll of the noised images given their labels, and the accuracy of training-free classification.

    One draw of the noise, and no more passes than the figures take: for looking at a flow while it trains.

    Args:
        flow: in eval mode.
        images: the test set; noise is seeded by an image's index.
        limit: so many images, spread evenly over the set.
        exhaustive: also classify with one pass for every class.

    Returns:
        ``nll`` in nats per dimension; for a flow with a range of noise levels, ``noise``: the one of all
        figures; ``top1_gradient``, ``top1_normalised`` and
        ``top1_exhaustive`` as shares, with classes.
    """
    sums: dict[str, float] = {}
    images = matched(flow, images)
    for batch in held_out_batches(flow, images, limit=limit, batch_size=_TOGETHER):
        values = {"nll": nll_per_dim(log_densities(flow, batch)[0], flow.config.dims)}
        if batch.levels is not None:
            values["noise"] = batch.levels
        if batch.labels is not None:
            slopes = classify(flow, batch.images, "gradient", batch.level, seeds=batch.seeds)
            scores = {"gradient": slopes, "normalised": slopes / embedding_distances(flow)}
            if exhaustive:
                scores["exhaustive"] = classify(
                    flow, batch.images, "exhaustive", batch.level, seeds=batch.seeds
                )
            values |= {f"top1_{rule}": _hits(own, batch.labels)[:, 0] for rule, own in scores.items()}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value.sum())
    return {name: value / min(limit, len(images)) for name, value in sums.items()}
