"""Gradients of every strategy, against plain autograd on slow readings of the reverse pass (float64)."""

import pytest
import torch

from flowback import AlignmentConfig
from flowback.alignment.loss import Projector, alignment_loss
from flowback.alignment.strategies import encode
from reference import (
    decode_to_the_letter,
    decode_with_autograd,
    decode_with_autograd_and_cache,
    decode_with_sweeps,
    random_flow,
    random_images,
)

# Sets of locations over 4 blocks of 2 layers: one, two adjacent, two apart, two in one block, all.
ONE = ((4, 1),)
LOW = ((2, 2),)
TWO = ((3, 1), (4, 2))
APART = ((4, 2), (1, 1))
SAME = ((3, 1), (3, 2))
ALL = ((1, 1), (2, 2), (3, 1), (4, 2))
SETS = pytest.mark.parametrize("locations", [ONE, LOW, TWO, APART, SAME, ALL], ids=str)
CLASSES = pytest.mark.parametrize("classes", [0, 5], ids=["unconditional", "classes"])
WEIGHT = 0.7
# Exact up to rounding: the largest relative error seen is 2e-14.
RELATIVE = 1e-8


class Case:
    """A flow, a projector and a batch."""

    def __init__(self, classes=5, batch=3, dtype=torch.float64, **changes):
        self.flow = random_flow(num_classes=classes, blocks=4, dtype=dtype, **{"image_size": 6, **changes})
        self.projector = Projector(self.flow.config.width, 24, 6).to(dtype)
        self.images = random_images(self.flow, batch)
        generator = torch.Generator().manual_seed(2)
        self.targets = torch.randn(batch, self.flow.config.tokens, 6, generator=generator, dtype=dtype)
        self.labels = torch.arange(batch) % classes if classes else None
        self.drop = torch.arange(batch) == 1 if classes else None

    def encode(self, config):
        return encode(self.flow, self.images, self.labels, self.drop, config)

    def likelihood(self, out):
        return -out.log_prob.mean() / self.flow.config.dims

    def alignment(self, hidden):
        return WEIGHT * alignment_loss(hidden, self.targets, self.projector).loss

    def parameters(self):
        named = {f"flow.{name}": p for name, p in self.flow.named_parameters()}
        return named | {f"projector.{name}": p for name, p in self.projector.named_parameters()}

    def gradients(self, loss):
        named = self.parameters()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return dict(zip(named, found, strict=True))

    def both(self, config):
        out = self.encode(config)
        return self.gradients(self.likelihood(out) + self.alignment(out.hidden))

    def expected(self, locations, decode):
        """Gradients of the likelihood on the encode pass and of the alignment on ``decode``."""
        plain = self.flow(self.images, self.labels, self.drop)
        likelihood = self.gradients(self.likelihood(plain))
        hidden = decode(self.flow, plain.z.detach(), self.labels, self.drop, locations)
        alignment = self.gradients(self.alignment(hidden))
        return {name: add(likelihood[name], alignment[name]) for name in likelihood}


def add(a, b):
    return b if a is None else a if b is None else a + b


def assert_same(found, expected, relative=RELATIVE):
    for name, value in expected.items():
        if value is None:
            assert found[name] is None or not found[name].any(), name
        else:
            assert found[name] is not None, name
            assert (found[name] - value).norm() <= relative * value.norm(), name


def config(strategy, locations=TWO, order=0, tolerance=1e-12):
    return AlignmentConfig(strategy=strategy, locations=locations, order=order, tolerance=tolerance)


@SETS
@CLASSES
def test_exact_equals_sequential_decoding_under_autograd(locations, classes):
    case = Case(classes)
    expected = case.expected(locations, decode_with_autograd)
    assert_same(case.both(config("reverse", locations, "exact")), expected)


@CLASSES
def test_exact_equals_sequential_decoding_with_a_cache(classes):
    case = Case(classes)
    expected = case.expected(TWO, decode_with_autograd_and_cache)
    assert_same(case.both(config("reverse", TWO, "exact")), expected)


@SETS
@pytest.mark.parametrize("order", [0, 1, 3, 15])
def test_order_k_equals_k_plus_one_sweeps(locations, order):
    case = Case()

    def sweeps(*arguments):
        return decode_with_sweeps(*arguments, sweeps=order + 1)

    assert_same(case.both(config("reverse", locations, order)), case.expected(locations, sweeps))


@pytest.mark.parametrize("order", [0, 2, "exact"])
def test_order_k_equals_the_series_of_the_dense_jacobian(order):
    """One image, one block, N as a matrix: u is the sum of the powers 0 ... k of N^T, applied to g."""
    case = Case(batch=1)
    block, tokens = case.flow.blocks[3], case.flow.config.tokens
    context = block.context(case.labels, case.drop).detach()
    z = case.flow(case.images, case.labels, case.drop).z.detach()
    x = block.inverse(z, context)

    def phi(flat):
        shift, log_scale, _ = block.predict(flat.view_as(x), context)
        return (shift + log_scale.exp() * z).flatten()

    def loss(flat):
        return case.alignment({(4, 1): block.predict(flat.view_as(x), context, [1]).hidden[1]})

    transposed = torch.autograd.functional.jacobian(phi, x.flatten()).T
    g = torch.autograd.functional.jacobian(loss, x.flatten())
    assert transposed.matrix_power(tokens).abs().max() == 0  # nilpotent
    terms = tokens if order == "exact" else order + 1
    u = sum(transposed.matrix_power(j) @ g for j in range(terms))
    # The hidden state comes before the output projection, whose gradient is therefore u dPhi/dtheta alone.
    (expected,) = torch.autograd.grad(phi(x.flatten()), block.proj_out.weight, u)
    found = case.gradients(case.alignment(case.encode(config("reverse", ONE, order)).hidden))
    assert_same(found, {"flow.blocks.3.proj_out.weight": expected})


@SETS
def test_literal_and_detach_equal_algorithm_2_to_the_letter(locations):
    case = Case()
    expected = case.expected(locations, decode_to_the_letter)
    assert_same(case.both(config("reverse-literal", locations)), expected)
    assert_same(case.both(config("detach", locations)), expected)


@pytest.mark.parametrize("strategy", ["forward", "detach", "reverse", "reverse-literal"])
def test_values_are_those_of_the_plain_flow(strategy):
    case = Case()
    plain = case.flow(case.images, case.labels, case.drop, hidden=ALL)
    out = case.encode(config(strategy, ALL))
    assert torch.equal(out.z, plain.z)
    assert torch.equal(out.log_det, plain.log_det)
    assert set(out.hidden) == set(ALL)
    assert all(torch.equal(out.hidden[place], plain.hidden[place]) for place in ALL)
    with torch.no_grad():
        quiet = case.encode(config(strategy, ALL))
    assert all(torch.equal(quiet.hidden[place], plain.hidden[place]) for place in ALL)


@pytest.mark.parametrize("strategy", ["detach", "reverse"])
@SETS
def test_likelihood_gradient_is_that_of_the_plain_flow(strategy, locations):
    """Bit for bit, below the aligned blocks, whatever the alignment adds above."""
    case = Case()
    plain = case.gradients(case.likelihood(case.flow(case.images, case.labels, case.drop)))
    out = case.encode(config(strategy, locations))
    found = case.gradients(case.likelihood(out))
    assert all(value is None or torch.equal(found[name], value) for name, value in plain.items())
    both = case.both(config(strategy, locations))
    for t in range(1, min(block for block, _ in locations)):
        for name, value in plain.items():
            if name.startswith(f"flow.blocks.{t - 1}."):
                assert torch.equal(both[name], value)


@pytest.mark.parametrize(
    ("strategy", "reached"),
    [("forward", {1, 2, 3}), ("detach", {3}), ("reverse-literal", {3}), ("reverse", {3, 4})],
)
def test_parameters_reached_by_the_alignment(strategy, reached):
    """An alignment of block 3 of 4; each strategy reaches the blocks that method.md names, and no other."""
    case = Case()
    found = case.gradients(case.alignment(case.encode(config(strategy, ((3, 1),))).hidden))
    blocks = {int(name.split(".")[2]) + 1 for name, g in found.items() if "blocks" in name and g is not None}
    assert blocks == reached
    assert all(g is not None and g.any() for name, g in found.items() if name.startswith("projector"))
    assert all((found[f"flow.blocks.{t - 1}.class_table"] != 0).any() for t in reached)
