"""Size and angle of the two losses' gradients, block by block."""

import math

import pytest
import torch

from flowback import AlignmentConfig
from flowback.alignment.align import Noised
from flowback.alignment.loss import Projector, alignment_loss
from flowback.flow.likelihood import nll_per_dim
from flowback.training.monitoring import gradient_balance
from reference import random_flow, random_images


def setting(strategy, weight=0.1):
    flow = random_flow(blocks=3)
    projector = Projector(flow.config.width, 16, 6).double()
    labels, targets = torch.tensor([0, 1]), torch.randn(2, 16, 6, dtype=torch.float64)
    config = AlignmentConfig(strategy=strategy, locations=((2, 1),), weight=weight)
    return flow, projector, Noised(random_images(flow, 2), labels), targets, config


def test_numbers_are_those_of_two_separate_backward_passes():
    flow, projector, batch, targets, config = setting("forward")
    images, labels = batch[:2]
    found = gradient_balance(flow, projector, batch, targets, config)
    assert all(p.grad is None for p in flow.parameters())

    def vectors(loss):
        flow.zero_grad()
        loss.backward()
        return [
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
                    for p in block.parameters()
                ]
            )
            for block in flow.blocks
        ]

    out = flow(images, labels, hidden=config.locations)
    nll = vectors(nll_per_dim(flow(images, labels).log_prob.mean(), flow.config.dims))
    aligned = vectors(0.1 * alignment_loss(out.hidden, targets, projector).loss)
    for t in (1, 2, 3):
        a, b = nll[t - 1], aligned[t - 1]
        assert found[f"grad_nll_{t}"] == pytest.approx(float(a.norm()), rel=1e-12)
        assert found[f"grad_alignment_{t}"] == pytest.approx(float(b.norm()), rel=1e-12)
        if t < 3:
            assert found[f"grad_cosine_{t}"] == pytest.approx(float(a @ b / a.norm() / b.norm()), rel=1e-9)
    assert "grad_cosine_3" not in found  # the encode pass does not lead from block 2 to block 3


def test_only_images_that_count_are_compared():
    """With all weight on the first image, its alignment alone; with none, nothing to compare."""
    flow, projector, batch, targets, config = setting("forward")
    first = batch._replace(alignment_weights=torch.tensor([2.0, 0.0]).double())
    found = gradient_balance(flow, projector, first, targets, config)
    alone = gradient_balance(flow, projector, Noised(batch.images[:1], batch.labels[:1]), targets[:1], config)
    assert found["grad_alignment_1"] == pytest.approx(alone["grad_alignment_1"], rel=1e-9)
    none = batch._replace(alignment_weights=torch.zeros(2).double())
    nothing = gradient_balance(flow, projector, none, targets, config)
    assert nothing == {f"grad_nll_{t}": found[f"grad_nll_{t}"] for t in (1, 2, 3)}


@pytest.mark.parametrize(("strategy", "reached"), [("forward", [1, 2]), ("detach", [2]), ("reverse", [2, 3])])
def test_reach_and_weight_of_each_strategy(strategy, reached):
    found = gradient_balance(*setting(strategy))
    assert [t for t in (1, 2, 3) if found[f"grad_alignment_{t}"] > 0] == reached
    assert [t for t in (1, 2, 3) if f"grad_cosine_{t}" in found] == reached
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())
    doubled = gradient_balance(*setting(strategy, weight=0.2))
    assert doubled["grad_alignment_2"] == pytest.approx(2 * found["grad_alignment_2"], rel=1e-12)
    assert doubled["grad_cosine_2"] == pytest.approx(found["grad_cosine_2"], rel=1e-12)
    assert doubled["grad_nll_2"] == found["grad_nll_2"]
