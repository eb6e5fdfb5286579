from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from flowback.data.image_set import MemoryImages
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError
from flowback.evaluation.linear_probe import (
    PENALTIES,
    all_locations,
    cknna,
    features,
    linear_probe,
    probe_features,
)
from flowback.flow.likelihood import add_noise
from reference import random_flow


def digit_set(count: int = 40) -> MemoryImages:
    digits = load_digits()
    pixels = torch.from_numpy(digits.images[:count] * 15).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target[:count]).long()
    return MemoryImages("digits", tuple("0123456789"), labels, pixels)


def test_features_of_all_locations_from_one_pass(monkeypatch):
    flow, images = random_flow(), digit_set(20)
    locations = all_locations(flow)
    assert locations == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all_locations(random_flow(layers=(1, 2))) == [(1, 1), (2, 1), (2, 2)]
    calls = []
    monkeypatch.setattr(
        flow, "forward", lambda *a, forward=flow.forward, **k: calls.append(1) or forward(*a, **k)
    )
    tables = features(flow, images, locations, seed=4, batch_size=8)
    assert len(calls) == 3  # batches of 8, 8, 4
    noised = add_noise(to_unit_range(images.pixels).double(), flow.config, range(4, 24))
    for location in locations:
        alone = flow(noised, hidden=[location]).hidden[location].mean(dim=1)
        torch.testing.assert_close(tables[location], alone.detach().float(), rtol=1e-5, atol=1e-6)


def test_features_know_no_label():
    flow = random_flow()
    images = digit_set(12)
    relabelled = MemoryImages("digits", images.classes, images.labels.flip(0), images.pixels)
    one, other = (features(flow, side, [(2, 2)])[2, 2] for side in (images, relabelled))
    assert torch.equal(one, other)


def clusters(count: int, spread: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return 4 * np.eye(5)[labels] + spread * generator.standard_normal((count, 5)), labels


def test_linear_probe_finds_what_is_there_and_nothing_else():
    rows, labels = clusters(150, 0.5, seed=0)
    others, truth = clusters(90, 0.5, seed=1)
    accuracy, penalty = linear_probe(rows, labels, others, truth)
    assert accuracy > 0.97
    assert penalty in PENALTIES
    scrambled = np.random.default_rng(2).permutation(labels)
    assert linear_probe(rows, scrambled, others, truth)[0] < 0.6


def test_validation_prefers_a_strong_penalty_where_features_are_mostly_noise():
    generator = np.random.default_rng(3)
    labels = np.arange(120) % 2
    rows = generator.standard_normal((120, 100))
    rows[:, 0] += 1.2 * (2 * labels - 1)
    assert linear_probe(rows, labels, rows, labels)[1] < max(PENALTIES)


def test_probe_reports_each_location():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 4
    knows = torch.nn.functional.one_hot(labels, 6).float() + 0.1 * torch.randn(120, 6, generator=generator)
    blind = torch.randn(120, 6, generator=generator)
    sides = [{(1, 1): blind[part], (1, 2): knows[part]} for part in (slice(80), slice(80, 120))]
    none, full = probe_features(sides[0], labels[:80], sides[1], labels[80:], encoder=knows[80:])
    assert (none.location, full.location) == ((1, 1), (1, 2))
    assert full.linear > 0.97
    assert full.knn > 0.97
    assert full.cknna == pytest.approx(1)
    assert max(none.linear, none.knn) < 0.6
    assert none.cknna < 0.5


def test_cknna_of_equal_turned_and_unrelated_features():
    torch.manual_seed(0)
    rows = torch.randn(200, 8, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert cknna(rows, 3 * rows @ turn) == pytest.approx(1, abs=1e-12)
    assert cknna(rows, torch.randn(200, 8)) < 0.2
    assert 0.3 < cknna(rows, rows + 0.3 * torch.randn_like(rows)) < 0.95


def test_cknna_by_loops():
    torch.manual_seed(1)
    a, b = torch.randn(12, 3).double(), torch.randn(12, 4).double()

    def align(x, y, k=4):
        total = 0.0
        sides = [torch.nn.functional.normalize(side, dim=1) for side in (x, y)]
        grams = [(s @ s.T).tolist() for s in sides]
        means = [[sum(row) / 12 for row in gram] for gram in grams]
        for i in range(12):
            near = [set(sorted((j for j in range(12) if j != i), key=lambda j: -g[i][j])[:k]) for g in grams]
            for j in near[0] & near[1]:
                total += (grams[0][i][j] - means[0][i]) * (grams[1][i][j] - means[1][i])
        return total

    expected = align(a, b) / (align(a, a) * align(b, b)) ** 0.5
    assert cknna(a, b, neighbours=4) == pytest.approx(expected, rel=1e-10)


def test_bad_input():
    with pytest.raises(InputError, match=r"\(3, 1\) is outside the model"):
        features(random_flow(), digit_set(4), [(3, 1)])
    with pytest.raises(InputError, match="needs more images"):
        cknna(torch.zeros(5, 2), torch.zeros(5, 3))
