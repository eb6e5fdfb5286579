"""Folded batch norms against the norms themselves, in float64, on networks of every kind that has them."""

import pytest
import timm
import torch
from torch import nn

import flowback
from flowback.alignment import batch_norms


def trained(model):
    """With statistics, scales and shifts far from those that a norm begins with."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    return model.double().eval()


@pytest.mark.parametrize(
    ("name", "norms", "folded"),
    [
        ("resnet18", 20, 20),
        ("mobilenetv3_small_050", 34, 34),
        ("tf_efficientnet_lite0", 49, 49),
        ("resnetv2_50", 49, 32),  # norms that read a sum, before the activation, stay
        ("vit_tiny_patch16_224", 0, 0),
    ],
)
@torch.no_grad()
def test_features_are_the_same(name, norms, folded):
    model = trained(timm.create_model(name, pretrained=False, num_classes=0))
    images = torch.randn(2, 3, 224 if "vit" in name else 64, 224 if "vit" in name else 64).double()
    before = model(images), model.forward_intermediates(images, intermediates_only=True)[-1]
    pairs = batch_norms.foldable(model)
    assert len(pairs) == folded
    batch_norms.fold(model, pairs)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms - folded
    after = model(images), model.forward_intermediates(images, intermediates_only=True)[-1]
    for found, expected in zip(after, before, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


class Shared(nn.Module):
    """A norm in two places, a convolution that two read, and a pair."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.twice, self.one, self.pair = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        y = self.twice(self.first(x)) + self.twice(self.first(2 * x))
        read_by_two = self.second(y)
        return self.pair(self.third(self.one(read_by_two) + read_by_two))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x if x.mean() > 0 else -x))


class Own(nn.BatchNorm2d):
    """A norm that does more than its name says."""

    def forward(self, x):
        return super().forward(x) ** 2


@torch.no_grad()
def test_only_what_is_surely_the_same_is_folded():
    model, x = trained(Shared()), torch.randn(2, 3, 4, 4).double()
    expected, pairs = model(x), batch_norms.foldable(model)
    assert pairs == [("third", "pair")]
    batch_norms.fold(model, pairs)
    torch.testing.assert_close(model(x), expected, atol=1e-12, rtol=1e-12)
    assert batch_norms.foldable(Untraceable()) == []
    assert batch_norms.foldable(nn.Sequential(nn.Conv2d(3, 3, 1), Own(3))) == []
    unmeasured = nn.BatchNorm2d(3, track_running_stats=False)
    assert batch_norms.foldable(nn.Sequential(nn.Conv2d(3, 3, 1), unmeasured)) == []


def test_an_encoder_is_known_by_its_published_weights(monkeypatch):
    """Caches and prepared features go to other machines, whose rounding of folded weights may differ."""
    folded = flowback.create_encoder()
    monkeypatch.setattr(batch_norms, "foldable", lambda model: [])
    plain = flowback.create_encoder()
    assert folded.fingerprint == plain.fingerprint
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.model.modules())
    images = 2 * torch.rand(2, 1, 28, 28) - 1
    expected = plain(images, 3)
    torch.testing.assert_close(folded(images, 3), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    assert folded.model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
