"""The alignment loss and the rule that lays one grid over another."""

import itertools
import math

import pytest
import torch

from flowback import AlignmentConfig, InputError
from flowback.alignment.loss import (
    ConvProjector,
    Projector,
    alignment_loss,
    alignment_weights,
    make_projector,
    resample,
    spatially_normalised,
)


def ramp(grid, rows=2.0, columns=-3.0):
    """A linear function of the position in the image, at the centres of a grid of patches: (1, grid², 1)."""
    centre = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    return (rows * centre[:, None] + columns * centre[None, :]).reshape(1, -1, 1)


@pytest.mark.parametrize(("patches", "grid"), [(16, 32), (16, 8), (16, 4), (8, 12), (7, 16)])
def test_a_linear_ramp_stays_that_ramp(patches, grid):
    """Between the outermost centres; there the rule is constant beyond. fp64 rounding only."""
    found = resample(ramp(patches), grid).view(grid, grid)
    expected = ramp(grid).view(grid, grid)
    border = -(-grid // patches)  # tokens that touch the outer ring, or kernels that reach over the edge
    inner = slice(border, grid - border)
    assert torch.allclose(found[inner, inner], expected[inner, inner], atol=1e-12)
    assert found.min() >= ramp(patches).min() - 1e-12
    assert found.max() <= ramp(patches).max() + 1e-12


def test_rows_and_columns_are_not_swapped():
    found = resample(ramp(4, rows=1.0, columns=0.0), 8).view(8, 8)
    assert (found.diff(dim=0)[1:-1] > 0).all()
    assert torch.allclose(found.diff(dim=1), torch.zeros(8, 7, dtype=torch.float64), atol=1e-15)


def test_coarser_grids_keep_the_mean():
    features = torch.randn(2, 256, 3, dtype=torch.float64)
    # Symmetric kernels of equal weight, cut at the border only.
    assert torch.allclose(resample(features, 1)[:, 0], features.mean(1), atol=0.1)
    constant = torch.ones(1, 256, 1, dtype=torch.float64)
    assert torch.allclose(resample(constant, 5), torch.ones(1, 25, 1, dtype=torch.float64), atol=1e-14)


def test_same_grid_is_untouched():
    features = torch.randn(2, 16, 3)
    assert resample(features, 4) is features


def test_patches_that_form_no_square_are_refused():
    with pytest.raises(InputError, match="no square grid"):
        resample(torch.zeros(1, 17, 3), 4)


def test_loss_is_minus_the_mean_cosine():
    projector = Projector(8, 16, 5)
    hidden = {(1, 2): torch.randn(3, 4, 8), (2, 1): torch.randn(3, 4, 8)}
    targets = torch.randn(3, 4, 5)
    found = alignment_loss(hidden, targets, projector)
    cosines = {}
    for place, state in hidden.items():
        rows = [
            float(p @ v / (p.norm() * v.norm()))
            for p, v in zip(projector(state).detach().reshape(-1, 5), targets.reshape(-1, 5), strict=True)
        ]
        cosines[place] = sum(rows) / len(rows)
        assert float(found.cosine[place]) == pytest.approx(cosines[place], abs=1e-6)
    assert found.loss.item() == pytest.approx(-sum(cosines.values()) / 2, abs=1e-6)
    assert found.loss.requires_grad
    assert not found.cosine[1, 2].requires_grad


def test_loss_of_parallel_features_is_minus_one_whatever_their_length():
    targets = torch.randn(2, 4, 5)
    hidden = {(1, 1): targets * torch.rand(2, 4, 1).add(0.1)}
    assert float(alignment_loss(hidden, targets, torch.nn.Identity()).loss) == pytest.approx(-1, abs=1e-6)
    hidden = {(1, 1): torch.zeros_like(targets)}
    assert float(alignment_loss(hidden, targets, torch.nn.Identity()).loss) == 0  # not NaN


def test_cosine_is_fp32_under_autocast():
    """Half-precision features of length 1e4 overflow in half-precision squares: 1e8 > 65504."""
    targets = torch.randn(2, 4, 5)
    hidden = {(1, 1): (1e4 * targets).half()}
    with torch.autocast("cpu", torch.bfloat16):
        found = alignment_loss(hidden, targets.half(), torch.nn.Identity())
    assert found.loss.dtype == torch.float32
    assert float(found.loss) == pytest.approx(-1, abs=1e-3)  # half has 11 bits


def test_targets_on_another_grid_are_resampled():
    hidden = {(1, 1): torch.randn(2, 64, 5)}
    targets = torch.randn(2, 16, 5)
    found = alignment_loss(hidden, targets, torch.nn.Identity())
    same = alignment_loss(hidden, resample(targets, 8), torch.nn.Identity())
    assert torch.equal(found.loss, same.loss)


def test_the_convolution_sees_each_token_and_its_neighbours_on_the_grid():
    """Against the sum over the 3 x 3 tokens around each place, zeros outside; float64, to rounding."""
    projector = ConvProjector(3, 2).double()
    hidden = torch.randn(2, 16, 3, dtype=torch.float64)
    weight, bias = projector.convolution.weight, projector.convolution.bias
    expected = bias.expand(2, 16, 2).clone()
    for row, column in itertools.product(range(4), range(4)):
        for down, right in itertools.product((-1, 0, 1), (-1, 0, 1)):
            if 0 <= row + down < 4 and 0 <= column + right < 4:
                token = hidden[:, 4 * (row + down) + column + right]
                expected[:, 4 * row + column] += token @ weight[:, :, down + 1, right + 1].T
    assert torch.allclose(projector(hidden), expected, rtol=0, atol=1e-12)


def test_spatially_normalised_targets_by_hand():
    features = torch.randn(3, 9, 4, dtype=torch.float64)
    found = spatially_normalised(features, 0.7)
    for image, feature in itertools.product(range(3), range(4)):
        values = features[image, :, feature]
        by_hand = (values - 0.7 * sum(values) / 9) / (
            math.sqrt(sum((values - values.mean()) ** 2) / 8) + 1e-6
        )
        assert torch.allclose(found[image, :, feature], by_hand, rtol=0, atol=1e-12)
    constant = torch.ones(1, 9, 2, dtype=torch.float64)
    assert bool(spatially_normalised(constant, 1.0).isfinite().all())  # no patch differs


def test_the_loss_takes_the_targets_as_asked():
    hidden, targets = {(1, 1): torch.randn(2, 16, 5)}, torch.randn(2, 16, 5)
    found = alignment_loss(hidden, targets, torch.nn.Identity(), spatial_norm=0.6)
    same = alignment_loss(hidden, spatially_normalised(targets, 0.6), torch.nn.Identity())
    assert torch.equal(found.loss, same.loss)
    assert not torch.equal(found.loss, alignment_loss(hidden, targets, torch.nn.Identity()).loss)


def test_the_projector_is_the_one_asked_for():
    assert isinstance(make_projector(AlignmentConfig(), 8, 5), Projector)
    assert isinstance(make_projector(AlignmentConfig(projector="conv"), 8, 5), ConvProjector)


LEVELS = torch.tensor([0.05, 0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("bounds", "weights"),
    [((0.1, 0.2), [0, 2, 2, 0]), ((0.0, 0.05), [4, 0, 0, 0]), ((0.0, 1.0), [1] * 4), ((0.4, 0.5), [0] * 4)],
)
def test_images_count_by_their_noise_level(bounds, weights):
    """Both ends are inside; those that count weigh as much as all together."""
    assert alignment_weights(LEVELS, AlignmentConfig(levels=bounds)).tolist() == weights
    assert alignment_weights(LEVELS, AlignmentConfig()) is None
    assert alignment_weights(None, AlignmentConfig(levels=bounds)) is None


def test_the_loss_is_the_mean_over_the_images_that_count():
    hidden, targets = {(1, 1): torch.randn(4, 4, 5), (2, 1): torch.randn(4, 4, 5)}, torch.randn(4, 4, 5)
    weights = alignment_weights(LEVELS, AlignmentConfig(levels=(0.1, 0.2)))
    found = alignment_loss(hidden, targets, torch.nn.Identity(), weights=weights)
    some = {place: state[1:3] for place, state in hidden.items()}
    expected = alignment_loss(some, targets[1:3], torch.nn.Identity())
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)
    assert found.cosine[2, 1].item() == pytest.approx(expected.cosine[2, 1].item(), abs=1e-6)
    of_images = [
        float(
            alignment_loss(
                {p: s[i : i + 1] for p, s in hidden.items()}, targets[i : i + 1], torch.nn.Identity()
            ).loss
        )
        for i in range(4)
    ]
    assert found.image_cosine.tolist() == pytest.approx([-value for value in of_images], abs=1e-6)


def test_where_no_image_counts_the_loss_is_0_and_has_a_graph():
    projector = Projector(5, 8, 5)
    found = alignment_loss(
        {(1, 1): torch.randn(2, 4, 5)}, torch.randn(2, 4, 5), projector, weights=torch.zeros(2)
    )
    found.loss.backward()
    assert found.loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in projector.parameters())
