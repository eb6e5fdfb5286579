"""Classification with the flow's own likelihood, without training (arXiv 2511.22345, Algorithm 1).

Gradient rule: class logits λ = 0, weights p = softmax(λ), the same p in every block; the predicted class is
the one along which log p(x | p) rises fastest. One forward and one backward pass, whatever the number of
classes: their number enters in the product of the weights with the class tables only.
Exhaustive rule: argmax over k of log p(x | k), one forward pass for every class.

The flow is trained on noised images, so both rules noise the image first, with a seed of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from flowback.data.images import ImageSet
from flowback.data.subset import evenly, in_batches
from flowback.errors import InputError
from flowback.flow import Flow
from flowback.flow.likelihood import to_unit_range
from flowback.flow.noise import add_noise
from flowback.progress import track

__all__ = ["Accuracy", "Method", "classify", "topk_accuracy"]

Method = Literal["gradient", "exhaustive"]

_ROWS = 256
"""Images in one forward pass of the exhaustive rule, over all classes."""


def classify(
    flow: Flow,
    images: Float[Tensor, "b c h w"],
    method: Method = "gradient",
    noise: bool = True,
    draws: int = 1,
    seeds: Sequence[int] | None = None,
    steps: int = 1,
    step_size: float = 1.0,
) -> Float[Tensor, "b k"]:
    """Scores of every class for every image; the largest is the predicted class.

    ``gradient`` scores are ∂ log p / ∂λ in nats per unit of logit (after several steps: the logits
    themselves); ``exhaustive`` scores are log p(x | k) in nats. No image's scores depend on the others'.

    Args:
        flow: a class-conditional flow.
        images: clean images on [-1, 1].
        method: the rule.
        noise: add the model's training noise to the images; False takes them as they are.
        draws: draws of the noise to average the scores over.
        seeds: of the noise, one for each image; None is 0, 1, 2, ...
        steps: steps of gradient ascent on the logits; 1 is Algorithm 1.
        step_size: of each step, in logits per nat.

    Raises:
        InputError: an unconditional flow, an unknown method, or numbers out of range.

    Example:
        >>> import torch
        >>> from flowback import Flow, ModelConfig, classify
        >>> flow = Flow(ModelConfig(image_size=8, channels=1, patch_size=2, width=32, blocks=2,
        ...                         layers=1, head_dim=16, num_classes=10))
        >>> classify(flow, torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    if not flow.config.num_classes:
        raise InputError("This model is unconditional: it has no classes to tell apart.")
    if draws < 1 or steps < 1 or step_size <= 0:
        raise InputError(
            f"draws {draws} and steps {steps} must be at least 1, and step_size {step_size} above 0."
        )
    seeds = range(len(images)) if seeds is None else seeds
    if len(seeds) != len(images):
        raise InputError(f"{len(seeds)} seeds for {len(images)} images; give one seed an image.")
    images = images.to(flow.device, flow.dtype)
    noised = [add_noise(images, flow.config, seeds, draw) for draw in range(draws)] if noise else [images]
    if method == "gradient":
        return _gradient(flow, noised, steps, step_size)
    if method == "exhaustive":
        return _exhaustive(flow, noised)
    raise InputError(f"Unknown method {method}; known: gradient, exhaustive.")


def _gradient(flow: Flow, draws: list[Tensor], steps: int, step_size: float) -> Tensor:
    """Algorithm 1, and further steps of ascent on the mean log-density over the draws.

    Weights enter detached: autograd then keeps only what the path to the class logits needs.
    """
    fixed = {name: tensor.detach() for name, tensor in (*flow.named_parameters(), *flow.named_buffers())}
    dtype = torch.promote_types(flow.dtype, torch.float32)
    logits = torch.zeros(len(draws[0]), flow.config.num_classes or 0, device=flow.device, dtype=dtype)
    rise = logits
    for _ in range(steps):
        rise = torch.zeros_like(logits)
        for images in draws:
            with torch.enable_grad():
                point = logits.detach().requires_grad_()
                weights = point.softmax(dim=-1).to(flow.dtype)
                log_prob = functional_call(flow, fixed, (images, weights)).log_prob
                (slope,) = torch.autograd.grad(log_prob.sum(), point)
            rise += slope / len(draws)
        logits = logits + step_size * rise
    return rise if steps == 1 else logits


@torch.no_grad()
def _exhaustive(flow: Flow, draws: list[Tensor]) -> Tensor:
    """Densities log p(x | k) for every class, several classes to a forward pass, averaged over the draws."""
    b, classes = len(draws[0]), flow.config.num_classes or 0
    together = max(1, _ROWS // max(1, b))
    total: Tensor | float = 0.0
    for images in draws:
        columns = []
        for ids in torch.arange(classes, device=flow.device).split(together):
            rows = images.repeat(len(ids), 1, 1, 1)
            log_prob = flow(rows, ids.repeat_interleave(b)).log_prob
            columns.append(log_prob.view(len(ids), b))
        total = total + torch.cat(columns).T / len(draws)
    assert isinstance(total, Tensor)
    return total


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
