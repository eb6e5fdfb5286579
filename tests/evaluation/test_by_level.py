"""Classification at several noise levels."""

from __future__ import annotations

import pytest
import torch

from flowback import Flow, InputError, ModelConfig, classify
from flowback.data.image_set import MemoryImages
from flowback.data.pixels import to_unit_range
from flowback.evaluation.by_level import LevelAccuracy, LevelChoice, accuracy_by_level
from flowback.evaluation.held_out import Accuracy, accuracy

LEVELS = (0.05, 0.2, 0.5)
RULES = ("gradient", "normalised", "exhaustive")


@pytest.fixture(scope="module")
def flow():
    torch.manual_seed(0)
    config = ModelConfig(
        image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=1, head_dim=8, num_classes=3,
        noise="range", noise_min=0.05, noise_max=0.5,
    )  # fmt: skip
    flow = Flow(config).eval()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return flow


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return MemoryImages("memory", ("0", "1", "2"), torch.arange(30) % 3, pixels)


@pytest.mark.parametrize("rule", RULES)
def test_each_level_is_that_levels_accuracy(flow, images, rule):
    """And the average is that of the mean of the scores, as `classify` gives it for all levels together."""
    found = accuracy_by_level(flow, images, LEVELS, rule, draws=2, seed=5, batch_size=7)
    assert found.levels == LEVELS
    for level, own in zip(LEVELS, found.at, strict=True):
        alone = accuracy(flow, images, rule, draws=2, seed=5, level=level)
        assert torch.equal(own.confusion, alone.confusion)
        assert (own.right1, own.right5, own.images) == (alone.right1, alone.right5, 30)
    unit = to_unit_range(images.read(torch.arange(30)))
    scores = classify(flow, unit, rule, LEVELS, 2, range(5, 35))
    called = scores.argmax(1)
    expected = torch.bincount(images.labels * 3 + called, minlength=9).view(3, 3)
    assert torch.equal(found.averaged.confusion, expected)
    assert len({own.right1 for own in found.at}) > 1  # levels that all agree would show nothing


def test_several_levels_average_their_scores(flow):
    unit = torch.rand(4, 1, 8, 8) * 2 - 1
    for rule in RULES:
        each = [classify(flow, unit, rule, level) for level in LEVELS]
        torch.testing.assert_close(classify(flow, unit, rule, LEVELS), torch.stack(each).mean(0))


def test_parts_merge(flow, images):
    whole = accuracy_by_level(flow, images, LEVELS)
    parts = [accuracy_by_level(flow, images, LEVELS, share=(rank, 3)) for rank in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    for own, other in zip((*whole.at, whole.averaged), (*merged.at, merged.averaged), strict=True):
        assert torch.equal(own.confusion, other.confusion)


def levels_of(*right):
    """Some accuracy at each level."""
    at = tuple(Accuracy("gradient", 10, count, 10, torch.eye(2).long(), 0, 1.0) for count in right)
    return LevelAccuracy(LEVELS, at, at[0])


def test_the_level_is_chosen_on_training_images_alone():
    """Where they and the images measured disagree, they decide; of equal levels, the first."""
    choice = LevelChoice(levels_of(3, 8, 8), levels_of(9, 5, 9))
    assert choice.level == 0.2
    assert choice.accuracy.right1 == 5
    record = choice.to_dict()
    assert record["noise"] == 0.2
    assert record["by_noise"][1] == {"noise": 0.2, "training_top1": 0.8, "top1": 0.5}
    assert record["averaged"] == {"training_top1": 0.3, "top1": 0.9}


def test_bad_input(flow, images):
    with pytest.raises(InputError, match=r"0\.6 is outside the range"):
        accuracy_by_level(flow, images, (0.2, 0.6))
    with pytest.raises(InputError, match="no noise levels"):
        accuracy_by_level(flow, images, ())
    with pytest.raises(InputError, match="no noise levels"):
        classify(flow, torch.zeros(1, 1, 8, 8), noise=())
