from __future__ import annotations

import math
import resource

import numpy as np
import pytest
import torch

from flowback.errors import InputError
from flowback.evaluation.metrics import Moments, frechet_distance


def correlated(n: int, dim: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, dim, dtype=torch.float64) @ torch.randn(dim, dim, dtype=torch.float64) + shift


def test_moments_are_numpys_mean_and_covariance():
    rows = correlated(300, 7, shift=100)  # far from zero: a sum of squares would lose digits
    moments = Moments(7)
    for batch in rows.split(64):
        moments.add(batch)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance, np.cov(rows, rowvar=False), rtol=1e-11, atol=1e-11)
    assert moments.count == 300


def test_merging_is_symmetric_to_the_last_bit():
    a, b = Moments.of(correlated(50, 9)), Moments.of(correlated(80, 9, shift=3))
    one, other = a.merge(b), b.merge(a)
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.scatter, other.scatter)
    assert one.count == other.count == 130
    assert (a.count, b.count) == (50, 80)


def test_merging_any_split_equals_the_whole():
    rows = correlated(200, 5, shift=20)
    whole = Moments.of(rows)
    parts = [Moments.of(part) for part in rows.split([3, 90, 1, 106])]
    left = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    right = parts[3].merge(parts[2].merge(parts[1].merge(parts[0])))
    for merged in (left, right, Moments(5).merge(whole), whole.merge(Moments(5))):
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-11, atol=1e-11)


def gaussian(mean, covariance) -> Moments:
    return Moments.from_covariance(1000, torch.tensor(mean), torch.tensor(covariance))


def test_distance_of_gaussians_known_in_closed_form():
    # Diagonal: Σ (μ₁ − μ₂)² + (σ₁ − σ₂)².
    a = gaussian([0.0, 1.0, 2.0], np.diag([1.0, 4.0, 9.0]).tolist())
    b = gaussian([1.0, 1.0, 0.0], np.diag([4.0, 4.0, 1.0]).tolist())
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4, abs=1e-12)
    # 2 × 2, not commuting: tr (Σ₁Σ₂)^½ = sqrt(tr Σ₁Σ₂ + 2 sqrt(det Σ₁Σ₂)).
    s1, s2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 4.0]])
    product = s1 @ s2
    cross = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(s1) + np.trace(s2) - 2 * cross
    found = frechet_distance(gaussian([0.0, 0.0], s1.tolist()), gaussian([0.0, 0.0], s2.tolist()))
    assert found == pytest.approx(expected, abs=1e-12)


def test_distance_is_symmetric_and_does_not_depend_on_the_order_of_rows():
    rows, others = correlated(100, 12), correlated(90, 12, shift=0.5)
    distance = frechet_distance(Moments.of(rows), Moments.of(others))
    assert frechet_distance(Moments.of(others), Moments.of(rows)) == pytest.approx(distance, rel=1e-9)
    shuffled = Moments.of(rows[torch.randperm(100)])
    assert frechet_distance(shuffled, Moments.of(others)) == pytest.approx(distance, rel=1e-10)


@pytest.mark.parametrize("count", [5, 40])
def test_a_set_has_no_distance_from_itself(count):
    # 5 rows in 12 dimensions: a singular covariance. Rounding of an eigenvalue, eps · λ², enters as its root.
    moments = Moments.of(correlated(count, 12))
    assert abs(frechet_distance(moments, moments)) < 1e-6 * float(moments.covariance.trace())


def test_statistics_of_50_000_rows_weigh_little():
    # The rows alone, in float64, would be 800 MB; a batch and three matrices of 2048² are 0.1 GB.
    moments = Moments(2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(4):
        moments.add(torch.randn(256, 2048))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024  # KiB


def test_bad_input():
    with pytest.raises(InputError, match="at least 2 images"):
        frechet_distance(Moments.of(correlated(1, 3)), Moments.of(correlated(5, 3)))
    with pytest.raises(InputError, match="4 and 3 features"):
        frechet_distance(Moments.of(correlated(9, 4)), Moments.of(correlated(9, 3)))
    broken = Moments.of(correlated(9, 3) * torch.nan)
    with pytest.raises(InputError, match="not finite"):
        frechet_distance(broken, broken)
