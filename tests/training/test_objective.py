import dataclasses

import pytest
import torch

from flowback.alignment.loss import alignment_weights
from flowback.config import AlignmentConfig
from flowback.flow.likelihood import nll_per_dim
from flowback.training.objective import Objective, weighted_mean

ALIGNMENT = AlignmentConfig(strategy="detach", locations=((2, 1),), hidden=8, weight=0.3)


def inputs(targets):
    images = torch.randn(4, 1, 8, 8)
    features = targets(None, None, images)
    return images, torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, False, False]), features


def test_total_is_nll_plus_weighted_alignment(config, targets):
    objective = Objective(dataclasses.replace(config, alignment=ALIGNMENT), targets.dim)
    images, labels, drop, features = inputs(targets)
    losses = objective(images, labels, drop, features)
    nll = nll_per_dim(objective.flow(images, labels, drop).log_prob, 64).mean()
    assert losses.nll == pytest.approx(nll.item(), abs=1e-6)
    assert losses.loss.item() == pytest.approx((losses.nll + 0.3 * losses.alignment).item(), abs=1e-6)
    assert set(losses.cosines) == {(2, 1)}
    assert float(losses.alignment) == pytest.approx(-float(losses.cosines[2, 1]), abs=1e-6)


def test_without_targets_it_is_the_likelihood_alone(config):
    objective = Objective(config)
    losses = objective(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert objective.projector is None
    assert losses.alignment is None
    assert torch.equal(losses.loss.detach(), losses.nll)


def test_bf16_stays_near_fp32(config, targets):
    """Values within bf16's precision (8 bits) of fp32, and in fp32."""
    objective = Objective(dataclasses.replace(config, alignment=ALIGNMENT), targets.dim)
    torch.nn.init.normal_(objective.flow.blocks[0].proj_out.weight, std=0.1)
    images, labels, drop, features = inputs(targets)
    full = objective(images, labels, drop, features)
    objective.config = dataclasses.replace(
        objective.config, train=dataclasses.replace(config.train, precision="bf16")
    )
    half = objective(images, labels, drop, features)
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.02)


def test_each_images_likelihood_counts_by_its_level(config, targets):
    model = dataclasses.replace(config.model, noise="range", noise_min=0.05, noise_max=0.5)
    train = dataclasses.replace(config.train, level_weight="square")
    ranged = dataclasses.replace(config, model=model, train=train, alignment=ALIGNMENT)
    objective = Objective(ranged, targets.dim)
    for parameter in objective.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images, labels, drop, features = inputs(targets)
    levels = torch.tensor([0.05, 0.1, 0.3, 0.5])
    losses = objective(images, labels, drop, features, None, levels)
    nll = nll_per_dim(objective.flow(images, labels, drop, noise=levels).log_prob, 64)
    assert losses.nll == pytest.approx(nll.mean().item(), abs=1e-6)
    weighted = (levels**2 * nll).mean() + 0.3 * losses.alignment
    assert losses.loss.item() == pytest.approx(weighted.item(), abs=1e-6)
    objective.config = dataclasses.replace(ranged, train=dataclasses.replace(train, level_weight="none"))
    plain = objective(images, labels, drop, features, None, levels)
    assert plain.loss.item() == pytest.approx((nll.mean() + 0.3 * losses.alignment).item(), abs=1e-6)


def test_parts_of_a_batch_align_the_images_that_count_in_all_of_it(config, targets):
    """In float64: parts of 1, 2 and 1 images, of which none, 2 and 1 count, by the weights of the batch."""
    alignment = dataclasses.replace(ALIGNMENT, levels=(0.1, 0.5))
    model = dataclasses.replace(config.model, noise="range", noise_min=0.05, noise_max=0.5)
    objective = Objective(dataclasses.replace(config, model=model, alignment=alignment), 6).double()
    images, labels, drop, features = inputs(targets)
    levels = torch.tensor([0.05, 0.1, 0.3, 0.5]).double()
    batch = [images.double(), labels, drop, features, levels, alignment_weights(levels, alignment)]

    def call(part):
        images, labels, drop, features, levels, weights = (value[part] for value in batch)
        return objective(images, labels, drop, features, None, levels, weights)

    whole = call(slice(None))
    found = weighted_mean([(len(levels[s]) / 4, call(s)) for s in (slice(0, 1), slice(1, 3), slice(3, 4))])
    for one, two in zip(found[:3], whole[:3], strict=True):
        torch.testing.assert_close(one, two.detach(), atol=1e-6, rtol=0)  # targets and cosines are fp32
    torch.testing.assert_close(found.cosines, whole.cosines, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.image_nll, whole.image_nll)
    torch.testing.assert_close(found.image_cosine, whole.image_cosine, atol=1e-6, rtol=0)
    assert whole.alignment.item() == pytest.approx(-whole.image_cosine[1:].mean().item(), abs=1e-6)
