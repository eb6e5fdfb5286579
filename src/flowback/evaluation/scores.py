"""Inception Score, and precision and recall of sets of features."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from flowback.errors import InputError

__all__ = ["InceptionScore", "PrecisionRecall", "Score", "precision_recall"]

_ROWS = 1024
"""Rows of a distance matrix held at once."""


class Score(NamedTuple):
    """Inception Score: mean and deviation over the splits."""

    mean: float
    std: float


class InceptionScore:
    """exp of the mean KL(p(y|x) ‖ p(y)), over splits of the images in their order (arXiv 1606.03498).

    Streams: one row of probabilities for each split. With 50,000 images, 10 splits are ADM's chunks of 5,000.

    Args:
        total: number of images that will come, here and in the parts that are merged.
        splits: into equal parts.
        start: place of the first image that comes here, in the order of all.
    """

    def __init__(self, total: int, splits: int = 10, start: int = 0) -> None:
        if total < splits:
            raise InputError(
                f"The Inception Score with {splits} splits needs as many images; there are {total}."
            )
        self.bounds = [split * total // splits for split in range(splits + 1)]
        self.next, self.seen = start, 0
        self.probability: Tensor | None = None
        self.negentropy = torch.zeros(splits, dtype=torch.float64)

    def add(self, logits: Float[Tensor, "n k"]) -> None:
        """Take in the next images."""
        log_p = logits.double().cpu().log_softmax(dim=1)
        p = log_p.exp()
        index = torch.arange(self.next, self.next + len(logits))
        split = torch.bucketize(index, torch.tensor(self.bounds[1:-1]), right=True)
        if self.probability is None:
            self.probability = torch.zeros(len(self.negentropy), logits.shape[1], dtype=torch.float64)
        self.probability.index_add_(0, split, p)
        self.negentropy.index_add_(0, split, (p * log_p).sum(dim=1))
        self.next += len(logits)
        self.seen += len(logits)

    def merge(self, other: InceptionScore) -> InceptionScore:
        """Both parts of the same images together."""
        made = copy.copy(self)
        made.seen = self.seen + other.seen
        made.negentropy = self.negentropy + other.negentropy
        if self.probability is not None and other.probability is not None:
            made.probability = self.probability + other.probability
        else:
            made.probability = other.probability if self.probability is None else self.probability
        return made

    def result(self) -> Score:
        """The score of all images.

        Raises:
            InputError: another number of images came than was announced.
        """
        if self.probability is None or self.seen != self.bounds[-1]:
            raise InputError(f"{self.bounds[-1]} images were announced, {self.seen} came.")
        counts = torch.tensor(self.bounds, dtype=torch.float64).diff()
        marginal = self.probability / counts[:, None]
        scores = (self.negentropy / counts - torch.special.xlogy(marginal, marginal).sum(dim=1)).exp()
        return Score(float(scores.mean()), float(scores.std(correction=0)))


class PrecisionRecall(NamedTuple):
    """Share of samples within the references' manifold, and of references within the samples'."""

    precision: float
    recall: float


def precision_recall(
    samples: Float[Tensor, "n d"], references: Float[Tensor, "m d"], k: int = 3
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, Eq. 1-2).

    A set's manifold is the union of balls around its points, each out to its k-th nearest neighbour.

    Raises:
        InputError: too few images for k neighbours.
    """
    if min(len(samples), len(references)) <= k:
        raise InputError(f"Precision and recall with {k} neighbours need more than {k} images on both sides.")
    # Centred, since the expansion |u|² - 2uv + |v|² loses digits to a common offset.
    centre = references.mean(dim=0)
    samples, references = samples - centre, references - centre
    precision = _covered(samples, references, _radii(references, k))
    recall = _covered(references, samples, _radii(samples, k))
    return PrecisionRecall(precision, recall)


def _squared_distances(rows: Tensor, others: Tensor) -> Tensor:
    gram = rows @ others.T
    return (rows.square().sum(1)[:, None] - 2 * gram + others.square().sum(1)).clamp(min=0)


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest neighbour, itself not counted."""
    parts = []
    for start in range(0, len(points), _ROWS):
        distance = _squared_distances(points[start : start + _ROWS], points)
        rows = torch.arange(len(distance), device=points.device)
        distance[rows, start + rows] = torch.inf
        parts.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(parts)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points within at least one centre's ball."""
    hits = sum(
        int((_squared_distances(part, centres) <= radii).any(dim=1).sum()) for part in points.split(_ROWS)
    )
    return hits / len(points)
