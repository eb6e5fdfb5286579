from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from flowback import (
    Alignment,
    AlignmentConfig,
    Encoder,
    Flow,
    InputError,
    ModelConfig,
    Recipe,
    RunConfig,
    create_encoder,
    register_encoder,
)
from flowback.alignment import encoders
from flowback.alignment.align import weight_at
from flowback.alignment.loss import ConvProjector, alignment_loss
from flowback.training.objective import Objective

MODEL = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=2, head_dim=8, num_classes=3
)


class Stub(Encoder):
    """Pixels of each patch, as they are fed."""

    def __init__(self) -> None:
        super().__init__(
            "stub", torch.nn.Identity(), Recipe(dim=4, stride=2, mean=(0.0,) * 3, std=(1.0,) * 3)
        )

    def feature_map(self, images, size):
        return torch.nn.functional.pixel_unshuffle(images[:, :1, :size, :size], 2)


@pytest.fixture
def flow():
    made = Flow(MODEL, ("a", "b", "c")).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("strategy", ["forward", "detach", "reverse"])
def test_it_is_what_training_does(flow, strategy):
    """Losses and every gradient, bit for bit, against the module that `flowback train` trains."""
    settings = AlignmentConfig(strategy=strategy, order=1, weight=0.3, hidden=8, locations=((1, 1), (2, 2)))
    align = Alignment(MODEL, target_dim=4, settings=settings).double()
    objective = Objective(RunConfig(model=MODEL, alignment=settings), 4).double()
    objective.flow.load_state_dict(flow.state_dict())
    objective.projector.load_state_dict(align.projector.state_dict())
    images, labels = torch.randn(3, 1, 8, 8).double(), torch.tensor([0, 1, 2])
    features = torch.randn(3, 4, 4)
    own, theirs = align(flow, images, labels, targets=features), objective(images, labels, None, features)
    for found, expected in zip(own[:3], theirs[:3], strict=True):
        assert torch.equal(found, expected)
    assert own.loss.item() == pytest.approx(own.nll.item() + 0.3 * own.alignment.item(), abs=1e-12)
    assert own.cosine.item() == pytest.approx(sum(own.cosines.values()).item() / 2, abs=1e-12)
    own.loss.backward()
    theirs.loss.backward()
    for module, other in ((flow, objective.flow), (align.projector, objective.projector)):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter.grad, other.get_parameter(name).grad), name


def test_strategy_none_is_the_likelihood_alone(flow):
    align = Alignment(MODEL, target_dim=4, strategy="none").double()
    out = align(flow, torch.zeros(1, 1, 8, 8).double(), targets=torch.ones(1, 4, 4))
    assert torch.equal(out.loss.detach(), out.nll)
    assert out.alignment is None
    assert out.cosine is None


def test_clean_images_are_shown_to_the_encoder(flow):
    encoder, images = Stub(), torch.rand(2, 1, 8, 8) * 2 - 1
    align = Alignment(MODEL, encoder, hidden=8).double()
    noised = flow.add_noise(images.double(), seeds=[0, 1])
    found = align(flow, noised, ["a", "c"], clean=images)
    expected = align(flow, noised, torch.tensor([0, 2]), targets=encoder(images, 2))
    assert torch.equal(found.loss, expected.loss)


def test_the_encoder_is_frozen_and_no_part_of_the_weights():
    align = Alignment(MODEL, create_encoder("efficientnet_lite0"), hidden=8)
    assert {name.split(".")[0] for name, _ in align.named_parameters()} == {"projector"}
    assert {name.split(".")[0] for name in align.state_dict()} == {"projector"}
    assert copy.deepcopy(align).encoder.dim == 112
    assert "strategy=reverse, order=0, locations=((2, 2),)" in repr(align)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"locations": [(3, 1)]}, "--alignment.locations: (3, 1) is outside the model"),
        ({"strategy": "backward"}, "which is not none or forward"),
        ({"target_dim": None}, "Alignment needs an encoder, or the width"),
    ],
)
def test_what_cannot_be_aligned_is_refused(options, sentence):
    with pytest.raises(InputError) as caught:
        Alignment(MODEL, **{"target_dim": 4, **options})
    assert sentence in str(caught.value)


def test_a_call_without_features_is_refused(flow):
    align = Alignment(MODEL, target_dim=4).double()
    with pytest.raises(InputError, match="Give the clean images as clean="):
        align(flow, torch.zeros(1, 1, 8, 8).double(), clean=torch.zeros(1, 1, 8, 8))


def test_a_registered_encoder_is_made_by_its_name(monkeypatch):
    monkeypatch.setattr(encoders, "_MAKERS", dict(encoders._MAKERS))  # other tests list the names
    register_encoder("test-stub")(lambda weights: Stub())
    assert isinstance(create_encoder("test-stub"), Stub)
    with pytest.raises(InputError, match="The encoder name test-stub is taken"):
        register_encoder("test-stub")(lambda weights: Stub())
    with pytest.raises(InputError, match="or timm:NAME"):
        create_encoder("test-stubb")


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0.5, 0.5, 0.5, 0.5]),
        ({"stop_at": 8}, [0.5, 0.5, 0.0, 0.0]),
        ({"stop_at": 8, "decay": "linear"}, [0.5, 0.25, 0.0, 0.0]),
        ({"stop_at": 8, "decay": "cosine"}, [0.5, 0.25, 0.0, 0.0]),
        ({"strategy": "none"}, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_the_weight_falls_as_asked(options, weights):
    config = AlignmentConfig(**{"strategy": "reverse", "weight": 0.5, **options})
    assert [weight_at(config, step) for step in (0, 4, 8, 9)] == pytest.approx(weights, abs=1e-12)


def test_half_a_cosine_falls_slowly_at_first():
    config = AlignmentConfig(strategy="reverse", weight=1.0, stop_at=9, decay="cosine")
    assert weight_at(config, 3) == pytest.approx(0.75, abs=1e-12)  # (1 + cos(π/3)) / 2


def test_options_of_projector_and_targets_reach_the_loss(flow):
    align = Alignment(MODEL, target_dim=4, projector="conv", spatial_norm=0.6).double()
    images, features = torch.randn(2, 1, 8, 8).double(), torch.randn(2, 4, 4)
    found = align(flow, images, targets=features).alignment
    hidden = flow(images, hidden=[(2, 2)]).hidden
    expected = alignment_loss(hidden, features, align.projector, 0.6).loss
    assert isinstance(align.projector, ConvProjector)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)  # the cosine is fp32, as the features


def test_means_of_unknown_images_cannot_be_subtracted():
    with pytest.raises(InputError, match=r"does not know your training images.*as targets="):
        Alignment(MODEL, target_dim=4, subtract="place")


def test_images_of_other_noise_levels_are_not_aligned():
    """Those inside the levels make the loss; figures are of all."""
    model = dataclasses.replace(MODEL, noise="range", noise_min=0.05, noise_max=0.5)
    flow = Flow(model).double()
    torch.nn.init.normal_(flow.blocks[1].proj_out.weight, std=0.1)
    align = Alignment(model, target_dim=4, levels=(0.1, 0.3), hidden=8, weight=0.5).double()
    images, features = torch.randn(3, 1, 8, 8).double(), torch.randn(3, 4, 4)
    noise = torch.tensor([0.05, 0.2, 0.3], dtype=torch.float64)
    out = align(flow, images, [0, 1, 2], targets=features, noise=noise)
    some = align(flow, images[1:], [1, 2], targets=features[1:], noise=noise[1:])
    assert out.alignment.item() == pytest.approx(some.alignment.item(), abs=1e-6)  # cosines are fp32
    assert out.alignment.item() == pytest.approx(-out.image_cosine[1:].mean().item(), abs=1e-6)
    assert out.loss.item() == pytest.approx(out.nll.item() + 0.5 * out.alignment.item(), abs=1e-6)
    assert out.image_nll.mean().item() == pytest.approx(out.nll.item(), abs=1e-12)
    assert torch.equal(out.image_nll[1:], some.image_nll)
    assert not out.image_nll.requires_grad
    assert not out.image_cosine.requires_grad
    none = align(flow, images, [0, 1, 2], targets=features, noise=0.4)
    assert none.alignment == 0
    none.loss.backward()
