"""A noise level as a condition: exact in float64, checked at the door, distributed and weighed as stated."""

import dataclasses
import math

import pytest
import torch

from flowback import InputError
from flowback.config import ModelConfig, TrainConfig
from flowback.flow.levels import levels_at, loss_weights
from reference import random_flow, random_images

LEVELS = torch.tensor([0.05, 0.2, 0.5], dtype=torch.float64)
LABELS = torch.tensor([0, 3, 4])


def ranged(**changes):
    return random_flow(noise="range", noise_min=0.05, noise_max=0.5, **changes)


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("noise", [0.05, 0.2, 0.5, LEVELS])
def test_inverse_is_the_identity_at_every_level(classes, noise):
    flow = ranged(num_classes=classes)
    images, labels = random_images(flow, 3), LABELS if classes else None
    found = flow.inverse(flow(images, labels, noise=noise).z, labels, noise=noise)
    torch.testing.assert_close(found, images, atol=1e-12, rtol=0)  # 16 tokens of float64


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_log_det_is_that_of_the_jacobian(noise):
    flow = ranged(image_size=4)
    image = random_images(flow, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, [2], noise=noise).z.flatten(), image)
    expected = torch.linalg.slogdet(jacobian.view(16, 16)).logabsdet
    torch.testing.assert_close(flow(image, [2], noise=noise).log_det[0], expected, atol=1e-12, rtol=0)


def test_each_image_has_its_own_level_in_both_directions():
    flow = ranged()
    images = random_images(flow, 1).expand(3, -1, -1, -1)
    together = flow(images, 1, noise=LEVELS)
    for row, level in enumerate(LEVELS):
        alone = flow(images[:1], 1, noise=float(level))
        torch.testing.assert_close(together.z[row], alone.z[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(together.log_prob[row], alone.log_prob[0], atol=1e-10, rtol=0)
    assert not torch.allclose(together.z[0], together.z[1], atol=1e-3)
    assert torch.equal(flow.log_prob(images, 1, noise=LEVELS), together.log_prob)


def test_the_embedding_is_the_stated_one():
    """By hand, one level: sines of log t, then cosines, frequencies 10000^(-k/half); GELU by erf."""
    flow = ranged()
    embedding, t = flow.blocks[1].level_embedding, 0.3
    assert set(embedding.state_dict()) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    half = flow.config.width // 2
    angles = [math.log(t) * 10_000 ** (-k / half) for k in range(half)]
    waves = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    inside = embedding.up.weight @ waves + embedding.up.bias
    inside = 0.5 * inside * (1 + torch.erf(inside / math.sqrt(2)))
    expected = embedding.down.weight @ inside + embedding.down.bias
    found = embedding(torch.tensor([t], dtype=torch.float64))[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # frequencies are stored in fp32
    context = flow.blocks[1].context(torch.tensor([2]), levels=torch.tensor([t], dtype=torch.float64))
    torch.testing.assert_close(context[0], flow.blocks[1].class_table[2] + found, atol=1e-12, rtol=0)


def test_gradient_of_the_embedding_is_that_of_differences():
    """Central differences of step 1e-6 in float64: to 1e-7 of the largest."""
    flow = ranged(image_size=4)
    images = random_images(flow, 2)
    weights = [p for block in flow.blocks for p in block.level_embedding.parameters()]
    assert len(weights) == 8
    total = lambda: flow(images, 1, noise=LEVELS[:2]).log_prob.sum()  # noqa: E731
    gradients = torch.autograd.grad(total(), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        place = gradient.abs().argmax()
        with torch.no_grad():
            flat = weight.view(-1)
            flat[place] += 1e-6
            up = total()
            flat[place] -= 2e-6
            slope = (up - total()) / 2e-6
            flat[place] += 1e-6
        assert gradient.view(-1)[place].item() == pytest.approx(slope.item(), rel=1e-6)


def test_a_flow_of_one_level_is_as_it_was():
    flow, images = random_flow(noise_std=0.1), random_images(random_flow(), 3)
    assert not any("level" in name for name in flow.state_dict())
    plain = flow(images, LABELS)
    assert flow.levels(0.1, 3) is None
    assert torch.equal(flow(images, LABELS, noise=0.1).z, plain.z)
    assert torch.equal(flow.inverse(plain.z, LABELS, noise=LEVELS * 0 + 0.1), flow.inverse(plain.z, LABELS))
    assert torch.equal(flow.add_noise(images, [1, 2, 3], noise=0.1), flow.add_noise(images, [1, 2, 3]))


def test_noise_of_a_level_is_that_of_a_flow_with_it_alone():
    images, seeds = random_images(ranged(), 3), [4, 5, 6]
    found = ranged().add_noise(images, seeds, noise=LEVELS)
    for row, level in enumerate(LEVELS.tolist()):
        alone = random_flow(noise_std=level).add_noise(images[row : row + 1], seeds[row : row + 1])
        torch.testing.assert_close(found[row], alone[0], atol=1e-15, rtol=0)


@pytest.mark.parametrize(
    ("changes", "noise", "message"),
    [
        ({"noise": "range"}, None, "give the level of its images as noise, from 0.05 to 0.5"),
        ({"noise": "range"}, 0.6, "0.6 is outside the range that the flow is trained on, 0.05 to 0.5"),
        ({"noise": "range"}, 0.5001, "0.5001 is outside the range"),
        ({"noise": "range"}, 0.0, "0 is outside the range"),
        ({"noise": "range"}, math.nan, "nan is outside the range"),
        ({"noise": "range"}, torch.tensor([0.1, 0.01, 0.2]), "0.01 is outside the range"),
        ({"noise": "range"}, torch.tensor([0.1, 0.2]), "2 noise levels for 3 images"),
        ({"noise_std": 0.1}, 0.2, "0.2 is not that of this flow, which knows only 0.1"),
        ({"noise": "uniform"}, 0.1, "uniform dequantisation: it has no noise level"),
    ],
)
def test_levels_that_the_flow_does_not_have(changes, noise, message):
    flow = random_flow(noise_min=0.05, noise_max=0.5, **changes)
    images = random_images(flow, 3)
    for call in (
        lambda: flow.log_prob(images, LABELS, noise=noise),
        lambda: flow.inverse(flow.tokens(images), LABELS, noise=noise),
        lambda: flow.add_noise(images, [0, 1, 2], noise=noise),
    ):
        with pytest.raises(InputError, match=message):
            call()
    if not isinstance(noise, torch.Tensor):
        with pytest.raises(InputError, match=message):
            flow(images, LABELS, noise=noise)


def test_ends_of_the_range_in_fp32_are_inside():
    flow = ranged(dtype=torch.float32)
    for level in (0.05, 0.5):
        assert flow.levels(level, 2).tolist() == [pytest.approx(level)] * 2
        assert flow.levels(torch.tensor(level, dtype=torch.float64).float(), 1) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_min": 0.5}, "--model.noise-min 0.5 must be above 0 and below --model.noise-max 0.3"),
        ({"noise_min": 0.3}, "below --model.noise-max"),
        ({"noise_min": 0.0}, "above 0"),
        ({"width": 15, "head_dim": 15}, "--model.width 15 must be even"),
    ],
)
def test_ranges_that_make_no_sense(changes, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(noise="range", **changes)
    ModelConfig(**changes)  # the settings of a range say nothing elsewhere


MODEL = ModelConfig(noise="range", noise_min=0.05, noise_max=0.5)


def normal(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def share_below(kind, t):
    """The distribution function of the levels, by its definition."""
    low, high = MODEL.noise_min, MODEL.noise_max
    place = {
        "uniform": lambda t: t,
        "square": lambda t: t * t,
        "log": math.log,
        "log-normal": lambda t: normal(math.log(t) + 1.2),
    }[kind]
    return (place(t) - place(low)) / (place(high) - place(low))


@pytest.mark.parametrize("kind", ["uniform", "square", "log", "log-normal"])
def test_levels_have_the_stated_distribution(kind):
    train = TrainConfig(levels=kind)
    shares = torch.linspace(0, 1, 21, dtype=torch.float64)
    levels = levels_at(shares, MODEL, train)
    assert (levels[0].item(), levels[-1].item()) == (pytest.approx(0.05), pytest.approx(0.5))
    assert [share_below(kind, t) for t in levels.tolist()] == pytest.approx(shares.tolist(), abs=1e-9)
    single = levels_at(torch.rand(1000), MODEL, train)
    assert single.dtype == torch.float32
    random_flow(noise="range", noise_min=0.05, noise_max=0.5).levels(single, 1000)  # all inside


def test_levels_stay_in_a_range_that_the_distribution_hardly_reaches():
    """The share of log-normal levels below 1e-20 is 0 in float64, and its quantile 0."""
    model = dataclasses.replace(MODEL, noise_min=1e-20)
    assert levels_at(torch.zeros(1), model, TrainConfig(levels="log-normal")).tolist() == [
        pytest.approx(1e-20)
    ]


def test_weights_are_the_stated_ones():
    t = torch.tensor([0.05, 0.2, 0.5], dtype=torch.float64)
    for kind, expected in {
        "level": t,
        "level-share": t / 0.55,
        "square": t**2,
        "square-share": t**2 / (0.05**2 + 0.5**2),
    }.items():
        found = loss_weights(t, MODEL, TrainConfig(level_weight=kind))
        torch.testing.assert_close(found, expected, atol=0, rtol=1e-12)
    assert loss_weights(t, MODEL, TrainConfig(level_weight="none")) is None
    shares = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for levels, kind in (("uniform", "level-share"), ("square", "square-share")):
        train = dataclasses.replace(TrainConfig(), levels=levels, level_weight=kind)
        mean = loss_weights(levels_at(shares, MODEL, train), MODEL, train).mean()
        assert mean.item() == pytest.approx(0.5, rel=1e-6)
