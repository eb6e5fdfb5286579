from __future__ import annotations

import pytest
import torch

from flowback.config import ModelConfig
from flowback.flow.likelihood import add_noise

GAUSSIAN = ModelConfig(image_size=16, channels=3, patch_size=4, noise_std=0.2)
UNIFORM = ModelConfig(image_size=16, channels=3, patch_size=4, noise="uniform")


@pytest.mark.parametrize("config", [GAUSSIAN, UNIFORM])
def test_noise_depends_on_the_images_own_seed_and_draw(config):
    images = torch.zeros(3, 3, 16, 16)
    first = add_noise(images, config, [1, 2, 3])
    assert torch.equal(first[2:], add_noise(images[:1], config, [3]))
    assert torch.equal(first, add_noise(images, config, [1, 2, 3]))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, add_noise(images, config, [1, 2, 3], draw=1))


def test_gaussian_noise_has_the_models_scale():
    images = torch.zeros(64, 3, 16, 16, dtype=torch.float64)
    noised = add_noise(images, GAUSSIAN, range(64))
    # 49,152 values, seed 0 ... 63: the standard error of the deviation is 0.2 / sqrt(2 · 49152) = 6e-4
    assert noised.std().item() == pytest.approx(0.2, abs=0.003)
    assert noised.dtype == torch.float64


def test_uniform_noise_fills_the_bin_of_each_value():
    values = torch.arange(256).repeat(3).view(1, 3, 16, 16)
    noised = add_noise(values / 127.5 - 1, UNIFORM, [0])
    place = (noised.double() + 1) * 128 - values
    assert ((place > -1e-4) & (place < 1 + 1e-4)).all()  # float32: 1e-7 of 256 levels
    assert place.mean().item() == pytest.approx(0.5, abs=0.05)
