from __future__ import annotations

import math

import pytest
import torch

from flowback.data.pixels import to_unit_range
from flowback.flow.likelihood import bits_per_dim, dequantise, log_prior, nll_per_dim

LEVELS = torch.arange(256, dtype=torch.uint8)


def test_log_prior_is_the_standard_normals():
    z = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=(1, 2))
    torch.testing.assert_close(log_prior(z), expected, rtol=0, atol=1e-12)


def test_uniform_8_bit_values_take_8_bits():
    # their dequantised density is uniform on [-1, 1): log 1/2 in every dimension
    assert bits_per_dim(12 * math.log(1 / 2), dims=12) == pytest.approx(8, abs=1e-12)


def test_bits_of_a_density_equal_the_discrete_entropy():
    # Values below 128 have 3/4 of the mass, evenly. Discrete: H = -3/4 log2(3/4/128) - 1/4 log2(1/4/128).
    # Continuous: density 3/4 on [-1, 0) and 1/4 on [0, 1), on the [-1, 1] scale.
    expected = -0.75 * math.log2(0.75 / 128) - 0.25 * math.log2(0.25 / 128)
    log_prob = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert bits_per_dim(log_prob, dims=1) == pytest.approx(expected, abs=1e-12)


def test_nll_is_nats_per_dimension_and_keeps_tensors():
    torch.testing.assert_close(nll_per_dim(torch.tensor([-6.0, 3.0]), 3), torch.tensor([2.0, -1.0]))


def test_8_bit_values_span_the_unit_range():
    images = to_unit_range(LEVELS)
    assert images[0] == -1
    assert images[255] == 1
    assert torch.equal(torch.round((images + 1) * 127.5).to(torch.uint8), LEVELS)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_dequantisation_fills_a_bin_of_its_own_for_every_value(share):
    images = to_unit_range(LEVELS)
    filled = dequantise(images, torch.full_like(images, share))
    torch.testing.assert_close(filled, 2 * (LEVELS + share) / 256 - 1, rtol=0, atol=1e-6)
    assert torch.equal(((filled + 1) * 128).floor().to(torch.uint8), LEVELS)
