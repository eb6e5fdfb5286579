from __future__ import annotations

import math

import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from flowback.errors import InputError
from flowback.evaluation.metrics import InceptionScore, Moments, frechet_distance, precision_recall


def score_of(logits: torch.Tensor, batch: int = 37, splits: int = 10):
    score = InceptionScore(len(logits), splits)
    for part in logits.split(batch):
        score.add(part)
    return score.result()


def features(n: int, dim: int, shift: float) -> torch.Tensor:
    """Non-negative and skewed, as pooled ReLU outputs."""
    return (torch.randn(n, dim) @ torch.randn(dim, dim) / dim**0.5 + shift).relu()


def test_fid_is_torch_fidelitys():
    torch.manual_seed(1)
    a, b = features(3000, 96, 0.3), features(2500, 96, 0.4)
    expected = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False
    )["frechet_inception_distance"]
    # theirs takes the means in float32
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-5)


def test_inception_score_is_torch_fidelitys():
    logits = 3 * torch.randn(1003, 1008)  # not a multiple of the splits
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    ours = score_of(logits)
    assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-10)
    assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-8)


def test_inception_score_of_known_answers():
    certain = 1000.0 * torch.eye(8).repeat(20, 1)  # 8 classes, each certain and equally frequent
    assert score_of(certain, splits=10).mean == pytest.approx(8, rel=1e-12)
    assert score_of(torch.zeros(40, 8)).mean == pytest.approx(1, rel=1e-12)


def test_inception_score_keeps_the_files_order():
    logits = 3 * torch.randn(200, 20)
    assert score_of(logits, batch=200) == pytest.approx(score_of(logits, batch=7), rel=1e-12)
    assert score_of(logits[torch.randperm(200)]).mean != pytest.approx(score_of(logits).mean, rel=1e-6)


def test_inception_score_of_parts_is_that_of_the_whole():
    logits, parts, start = 3 * torch.randn(53, 20), [], 0
    for rows in logits.split([20, 0, 33]):
        parts.append(InceptionScore(53, start=start))
        parts[-1].add(rows)
        start += len(rows)
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.result() == pytest.approx(score_of(logits), rel=1e-12)
    with pytest.raises(InputError, match="53 images were announced, 20 came"):
        parts[0].result()


@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_precision_and_recall_are_torch_fidelitys(shift):
    torch.manual_seed(2)
    mix = torch.randn(24, 24) / 24**0.5
    samples, references = torch.randn(1500, 24) @ mix + shift, torch.randn(1200, 24) @ mix
    precision, recall = calculate_precision_recall_full(samples, references)
    ours = precision_recall(samples, references)
    assert ours == pytest.approx((precision, recall), abs=1e-6)
    assert 0.1 < ours.recall < 0.99  # neither trivial


def test_precision_and_recall_tell_quality_from_coverage():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    half = grid[:50]  # inside the references, covers half
    assert precision_recall(half + 0.01, grid).precision == 1.0
    assert precision_recall(half + 0.01, grid).recall == pytest.approx(0.6, abs=0.1)
    assert precision_recall(grid + 100, grid) == (0.0, 0.0)
    assert precision_recall(grid, grid) == (1.0, 1.0)


def test_distances_survive_a_common_offset():
    # float32 at 1e4 resolves 1e-3: without centring, squared distances near 1 would drown
    samples, references = torch.randn(300, 4), torch.randn(300, 4)
    near = precision_recall(samples, references)
    assert precision_recall(samples + 1000, references + 1000) == pytest.approx(near, abs=0.01)


def test_bad_input():
    with pytest.raises(InputError, match="needs as many images"):
        InceptionScore(5)
    score = InceptionScore(20)
    score.add(torch.zeros(19, 3))
    with pytest.raises(InputError, match="20 images were announced, 19 came"):
        score.result()
    with pytest.raises(InputError, match="more than 3 images"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    assert math.isfinite(precision_recall(torch.zeros(9, 2), torch.zeros(9, 2)).precision)
