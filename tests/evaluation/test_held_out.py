from __future__ import annotations

import functools
import math

import pytest
import torch

from flowback import Flow, ModelConfig
from flowback.data.image_set import MemoryImages
from flowback.data.pixels import to_unit_range
from flowback.errors import InputError
from flowback.evaluation.held_out import Estimate, accuracy, held_out_figures, likelihood
from flowback.flow.likelihood import add_noise, bits_per_dim, nll_per_dim
from reference import random_flow


def image_set(count: int = 20, classes: int = 5) -> MemoryImages:
    pixels = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
    return MemoryImages("memory", tuple("abcde"), torch.arange(count) % classes, pixels)


def identity(**changes) -> Flow:
    """A flow that changes nothing: its density is the standard normal."""
    flow = Flow(ModelConfig(image_size=8, channels=1, patch_size=2, width=16, blocks=1, layers=1, head_dim=16,
                            num_classes=0, **changes))  # fmt: skip
    torch.nn.init.zeros_(flow.blocks[0].proj_out.bias)
    return flow.double().eval()


def test_bits_per_dim_of_the_standard_normal():
    # -log2 of the normal density at the dequantised value, plus log2(128) for bins of width 2/256.
    images = image_set(400)
    found = likelihood(identity(), images, draws=4).bits_per_dim
    x = torch.linspace(-1, 1, 10_001, dtype=torch.float64)  # pixels are uniform on all 256 values
    expected = (0.5 * x.square().mean() + 0.5 * math.log(2 * math.pi)) / math.log(2) + math.log2(128)
    assert abs(found.mean - expected) < 4 * found.error
    assert found.error < 0.01
    assert found.draw_error < found.error


def test_nll_is_that_of_the_noised_images_given_their_labels():
    flow, images = random_flow(), image_set()
    clean = to_unit_range(images.pixels).double()
    per_draw = [
        nll_per_dim(flow.log_prob(add_noise(clean, flow.config, range(9, 29), draw), images.labels), 64)
        for draw in range(2)
    ]
    found = likelihood(flow, images, draws=2, seed=9, batch_size=7)
    assert found.conditional
    assert found.nll.mean == pytest.approx(torch.stack(per_draw).mean().item(), rel=1e-12)
    without = likelihood(flow, images, draws=2, seed=9, conditional=False)
    assert without.nll.mean != pytest.approx(found.nll.mean, rel=1e-6)


def test_shares_of_the_images_add_up():
    flow, images = random_flow(), image_set()
    whole = likelihood(flow, images, draws=2, limit=11, batch_size=4)
    parts = [likelihood(flow, images, draws=2, limit=11, batch_size=4, share=(r, 12)) for r in range(12)]
    assert parts[11].nll_values.shape == (2, 0)
    merged = functools.reduce(lambda a, b: a.merge(b), parts)
    assert merged.nll.mean == pytest.approx(whole.nll.mean, rel=1e-12)
    assert merged.bits_per_dim.error == pytest.approx(whole.bits_per_dim.error, rel=1e-9)


def test_bits_per_dim_dequantises_whatever_the_model_was_trained_on():
    flow, images = random_flow(noise="gaussian"), image_set()
    other = random_flow(noise="uniform")  # same weights
    found = [likelihood(side, images).bits_per_dim.mean for side in (flow, other)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_for_a_model_of_dequantised_images_both_are_one_figure():
    flow = random_flow(noise="uniform")
    found = likelihood(flow, image_set())
    assert found.bits_per_dim.mean == pytest.approx(found.nll.mean / math.log(2) + math.log2(128), rel=1e-12)


def test_standard_errors_of_known_spread():
    generator = torch.Generator().manual_seed(0)
    images = 3 * torch.randn(1, 40_000, generator=generator, dtype=torch.float64)
    values = images + 0.5 * torch.randn(4, 40_000, generator=generator, dtype=torch.float64)
    found = Estimate.of(values)
    assert found.error == pytest.approx(math.sqrt((9 + 0.25 / 4) / 40_000), rel=0.02)
    assert found.draw_error == pytest.approx(math.sqrt(0.25 / 160_000), rel=0.02)
    assert Estimate.of(values[:1]).draw_error is None


def test_unlabelled_images_and_a_limit():
    images = MemoryImages("memory", (), None, image_set(30).pixels)
    found = likelihood(random_flow(), images, draws=1, limit=10)
    assert (found.nll_values.shape, found.conditional) == ((1, 10), False)


def test_no_draws_is_refused():
    with pytest.raises(InputError, match="--draws"):
        likelihood(identity(), image_set(), draws=0)


class Watched(MemoryImages):
    """Notes which images are read."""

    def read(self, indices):
        self.__dict__.setdefault("seen", []).extend(indices.tolist())
        return super().read(indices)


def test_a_limit_takes_images_of_every_class_in_every_figure():
    pixels = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(5).repeat_interleave(10)  # sorted by class, as folders are
    for measure in (likelihood, held_out_figures, accuracy):
        images = Watched("memory", tuple("abcde"), labels, pixels)
        measure(random_flow(torch.float32), images, limit=5)
        assert sorted({int(labels[index]) for index in images.seen}) == [0, 1, 2, 3, 4], measure.__name__


def test_figures_while_training_are_those_of_an_evaluation():
    flow, images = random_flow(), image_set()
    found = held_out_figures(flow, images, limit=7, exhaustive=True)
    assert found["nll"] == pytest.approx(likelihood(flow, images, draws=1, limit=7).nll.mean, rel=1e-12)
    for method in ("gradient", "exhaustive"):
        assert found[f"top1_{method}"] == accuracy(flow, images, method, limit=7, batch_size=2).top1
    assert set(held_out_figures(random_flow(num_classes=0), images, limit=50)) == {"nll"}


def test_figures_of_a_flow_with_a_range_are_those_of_one_level():
    flow, images = random_flow(noise="range", noise_min=0.05, noise_max=0.5), image_set()
    clean, middle = to_unit_range(images.pixels).double(), math.sqrt(0.05 * 0.5)
    for level in (0.1, None):
        found = likelihood(flow, images, draws=1, level=level, batch_size=7)
        at = level or middle
        log_prob = flow.log_prob(flow.add_noise(clean, range(20), noise=at), images.labels, noise=at)
        torch.testing.assert_close(
            found.nll_values[0], nll_per_dim(log_prob, 64).detach(), rtol=1e-12, atol=0
        )
    dequantised = add_noise(clean, ModelConfig(noise="uniform"), range(20))
    log_prob = flow.log_prob(dequantised, images.labels, noise=0.05)  # asked at the lowest
    torch.testing.assert_close(found.bits_values[0], bits_per_dim(log_prob, 64).detach(), rtol=1e-12, atol=0)
    figures = held_out_figures(flow, images, 20)
    assert figures["noise"] == pytest.approx(middle)
    assert figures["nll"] == pytest.approx(found.nll.mean, rel=1e-12)
    assert figures["top1_gradient"] == accuracy(flow, images, level=middle).top1
    assert "noise" not in held_out_figures(random_flow(), images, 20)
    with pytest.raises(InputError, match=r"0\.6 is outside the range"):
        accuracy(flow, images, level=0.6)
