import pytest
import torch

from flowback.config import TrainConfig
from flowback.training.state import average_decay, learning_rate, update_average


def test_warm_up_is_linear_and_the_cosine_ends_at_min_lr():
    config = TrainConfig(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1)
    assert [learning_rate(config, s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(config, 10) == pytest.approx(1.0)
    assert learning_rate(config, 55) == pytest.approx(0.55)  # half of the cosine: the middle of the range
    assert learning_rate(config, 100) == pytest.approx(0.1)


def test_warm_up_longer_than_the_run_still_ends():
    config = TrainConfig(steps=5, warmup_steps=10, lr=1.0)
    assert learning_rate(config, 4) == pytest.approx(1.0)


def test_average_starts_short_and_is_a_convex_combination():
    assert average_decay(0.9, 0) == pytest.approx(0.1)
    assert average_decay(0.9, 10_000) == 0.9
    average, weights = [torch.zeros(3)], [torch.ones(3)]
    update_average(average, weights, 0.75)
    assert torch.equal(average[0], torch.full((3,), 0.25))
    assert torch.equal(weights[0], torch.ones(3))
