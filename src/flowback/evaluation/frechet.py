"""Fréchet distance between two sets of features, from statistics that stream and merge.

    d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)          (Heusel et al., arXiv 1706.08500, Eq. 6)

Everything in float64. A distance in Inception features under a published protocol is called FID
(:mod:`flowback.evaluation.protocol`); one in another network's features is called after that network.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from flowback.alignment.encoders import Encoder
from flowback.errors import InputError
from flowback.flow.likelihood import to_unit_range

__all__ = ["Moments", "frechet_distance", "pooled_moments"]


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
        made = cls(rows.shape[1], rows.device)
        made.add(rows)
        return made

    @classmethod
    def from_covariance(
        cls, count: int, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]
    ) -> Moments:
        """Statistics that were computed elsewhere; the covariance is the unbiased one."""
        made = cls(len(mean))
        made.count = count
        made.mean, made.scatter = mean.double(), covariance.double() * (count - 1)
        return made

    def arrays(self) -> dict[str, Tensor]:
        """All that there is, for keeping; :meth:`from_arrays` takes it back."""
        return {"count": torch.tensor(self.count), "mean": self.mean.cpu(), "scatter": self.scatter.cpu()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor]) -> Moments:
        """Statistics from :meth:`arrays`."""
        made = cls(len(arrays["mean"]))
        made.count = int(arrays["count"])
        made.mean, made.scatter = arrays["mean"], arrays["scatter"]
        return made

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
        made = Moments(len(self.mean), self.mean.device)
        made.count, made.mean = self.count, self.mean
        made.scatter = self.scatter + other.scatter.to(self.mean)
        if other.count:
            made._shift(other.count, other.mean.to(self.mean))
        return made

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


def pooled_moments(encoder: Encoder, images: Iterable[UInt8[Tensor, "_ c h w"]]) -> Moments:
    """Statistics of an encoder's pooled features over batches of 8-bit images."""
    device = encoder.mean.device
    moments = Moments(encoder.dim)
    for batch in images:
        moments.add(encoder.pooled(to_unit_range(batch.to(device))).cpu())
    return moments
