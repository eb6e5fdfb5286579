"""Figures of two sets of features: Fréchet distance, Inception Score, precision and recall.

    d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)          (Heusel et al., arXiv 1706.08500, Eq. 6)

Statistics stream and merge; everything is in float64. A distance in Inception features under a published
protocol is called FID (:mod:`flowback.evaluation.protocol`); one in another network's features is called
after that network.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flowback.alignment.encoders import Encoder
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError

__all__ = [
    "InceptionScore",
    "Moments",
    "PrecisionRecall",
    "Score",
    "frechet_distance",
    "jackknife",
    "pooled_moments",
    "precision_recall",
]


class Moments:
    """Count, mean and scatter of feature rows, which arrive in batches.

    Holds one matrix of dim² numbers whatever the number of rows. Merging follows Chan, Golub and LeVeque
    (1979) and is symmetric to the last bit: ``a.merge(b)`` equals ``b.merge(a)``.

    Example:
        >>> import torch
        >>> rows = torch.randn(100, 3)
        >>> first, second = Moments(3), Moments(3)
        >>> first.add(rows[:30])
        >>> second.add(rows[30:])
        >>> torch.allclose(first.merge(second).covariance, torch.cov(rows.double().T))
        True
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Moments:
        """Statistics of rows that lie in memory."""
        moments = cls(rows.shape[1], rows.device)
        moments.add(rows)
        return moments

    @classmethod
    def from_covariance(
        cls, count: int, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]
    ) -> Moments:
        """Statistics that were computed elsewhere; the covariance is the unbiased one."""
        moments = cls(len(mean))
        moments.count = count
        moments.mean, moments.scatter = mean.double(), covariance.double() * (count - 1)
        return moments

    def arrays(self) -> dict[str, Tensor]:
        """All that there is, for keeping; :meth:`from_arrays` takes it back."""
        return {"count": torch.tensor(self.count), "mean": self.mean.cpu(), "scatter": self.scatter.cpu()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> Moments:
        """Statistics from :meth:`arrays`."""
        moments = cls(len(arrays["mean"]))
        moments.count = int(arrays["count"])
        moments.mean, moments.scatter = arrays["mean"], arrays["scatter"]
        return moments

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        """Take in a batch of rows."""
        if not len(rows):
            return
        rows = rows.to(self.mean)
        mean = rows.mean(dim=0)
        centred = rows - mean
        self.scatter.addmm_(centred.T, centred)
        self._shift(len(rows), mean)

    def _shift(self, count: int, mean: Tensor) -> None:
        """Account for another set's mean, whose own scatter has been added already."""
        total = self.count + count
        gap = mean - self.mean
        self.scatter.addr_(gap, gap, alpha=self.count * count / total)
        self.mean = (self.count * self.mean + count * mean) / total
        self.count = total

    def merge(self, other: Moments) -> Moments:
        """Statistics of both sets together."""
        merged = Moments(len(self.mean), self.mean.device)
        merged.count, merged.mean = self.count, self.mean
        merged.scatter = self.scatter + other.scatter.to(self.mean)
        if other.count:
            merged._shift(other.count, other.mean.to(self.mean))
        return merged

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Unbiased covariance.

        Raises:
            InputError: fewer than two rows.
        """
        if self.count < 2:
            raise InputError(f"A covariance needs at least 2 images, here there are {self.count}; give more.")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of the Gaussians with these moments.

    With Σ₁ = F·Fᵀ, the eigenvalues of Σ₁Σ₂ are those of the symmetric Fᵀ·Σ₂·F, which are found reliably;
    a matrix square root is not.

    Raises:
        InputError: statistics of different sizes, of fewer than two images, or not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(
            f"Statistics of {len(a.mean)} and {len(b.mean)} features cannot be compared; "
            "use references made with the same network and layer."
        )
    first, second = a.covariance, b.covariance.to(a.mean)
    gap = a.mean - b.mean.to(a.mean)
    if not all(bool(t.isfinite().all()) for t in (first, second, gap)):
        raise InputError("Feature statistics are not finite; look for broken images or weights.")
    values, vectors = torch.linalg.eigh(first)
    factor = vectors * values.clamp(min=0).sqrt()
    product = torch.linalg.eigvalsh(factor.T @ second @ factor)
    cross = product.clamp(min=0).sqrt().sum()
    return float(gap @ gap + first.trace() + second.trace() - 2 * cross)


def jackknife(groups: Sequence[Moments], reference: Moments) -> float:
    """Standard error of the Fréchet distance of all samples, by leaving out one of g groups at a time.

    s² = (g − 1)/g · Σᵢ (dᵢ − d̄)² (Efron and Stein 1981).

    Args:
        groups: statistics of g ≥ 2 groups of about as many samples each.
        reference: what the samples are compared with, taken as it is.
    """
    distances = []
    for left_out in range(len(groups)):
        first, *others = [group for index, group in enumerate(groups) if index != left_out]
        for group in others:
            first = first.merge(group)
        distances.append(frechet_distance(first, reference))
    values, count = torch.tensor(distances, dtype=torch.float64), len(groups)
    return float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt())


def pooled_moments(encoder: Encoder, images: Iterable[UInt8[Tensor, "_ c h w"]]) -> Moments:
    """Statistics of an encoder's pooled features over batches of 8-bit images."""
    device = encoder.mean.device
    moments = Moments(encoder.dim)
    for batch in images:
        moments.add(encoder.pooled(to_unit_range(batch.to(device))).cpu())
    return moments


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
        log_p = logits.cpu().double().log_softmax(dim=1)  # MPS has no float64
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
