"""Gradients of every strategy, against plain autograd on slow readings of the reverse pass (float64)."""

import functools
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flowback import AlignmentConfig, InputError
from flowback.alignment.loss import Projector, alignment_loss
from flowback.alignment.strategies import complete_series, encode, truncated_series
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
FEW = pytest.mark.parametrize("locations", [LOW, APART, ALL], ids=str)
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
        ranged = self.flow.config.noise == "range"
        self.levels = torch.linspace(0.02, 0.3, batch, dtype=dtype) if ranged else None

    def encode(self, config):
        return encode(self.flow, self.images, self.labels, self.drop, config, self.levels)

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
        plain = self.flow(self.images, self.labels, self.drop, noise=self.levels)
        likelihood = self.gradients(self.likelihood(plain))
        more = () if self.levels is None else (self.levels,)
        hidden = decode(self.flow, plain.z.detach(), self.labels, self.drop, locations, *more)
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
    assert_exact(Case(classes), locations)


@pytest.mark.parametrize("changes", [{"layers": (1, 2, 1, 3)}, {"log_scale_bound": 0.2}], ids=str)
def test_exact_with_uneven_blocks_and_bounded_scales(changes):
    assert_exact(Case(**changes), ((2, 2), (4, changes.get("layers", (2,))[-1])))


def assert_exact(case, locations):
    expected = case.expected(locations, decode_with_autograd)
    assert_same(case.both(config("reverse", locations, "exact")), expected)


@FEW
@CLASSES
def test_exact_with_a_noise_level_for_each_image(locations, classes):
    """The level's embedding too has the gradient of sequential decoding under autograd."""
    case = Case(classes, noise="range")
    expected = case.expected(locations, decode_with_autograd)
    assert expected["flow.blocks.3.level_embedding.up.weight"].any()
    assert_same(case.both(config("reverse", locations, "exact")), expected)


@CLASSES
@pytest.mark.parametrize(
    "decode", [decode_with_autograd_and_cache, functools.partial(decode_with_autograd, whole=True)]
)
def test_exact_equals_other_forms_of_sequential_decoding(classes, decode):
    case = Case(classes)
    expected = case.expected(TWO, decode)
    assert_same(case.both(config("reverse", TWO, "exact")), expected)


@FEW
@pytest.mark.parametrize("order", [0, 1, 3, 20])
def test_order_k_equals_k_plus_one_sweeps(locations, order):
    case = Case()

    def sweeps(*arguments):
        return decode_with_sweeps(*arguments, sweeps=order + 1)

    assert_same(case.both(config("reverse", locations, order)), case.expected(locations, sweeps))


@pytest.mark.parametrize(
    ("strategy", "order"), [("forward", 0), ("detach", 0), ("reverse", 2), ("reverse", "exact")]
)
def test_images_that_do_not_count_take_no_part(strategy, order):
    """The gradient is that of a batch of the others alone; 0, not None, if none counts."""
    case, some = Case(noise="range"), Case(noise="range")
    for name in ("images", "targets", "labels", "drop", "levels"):
        setattr(some, name, getattr(case, name)[1:])
    settings = config(strategy, TWO, order)

    def found(*weights):
        hidden = case.encode(settings).hidden
        weighted = alignment_loss(
            hidden, case.targets, case.projector, weights=torch.tensor(weights).double()
        )
        return case.gradients(WEIGHT * weighted.loss)

    assert_same(found(0, 1.5, 1.5), some.gradients(some.alignment(some.encode(settings).hidden)))
    nothing = found(0, 0, 0)
    assert nothing["flow.blocks.3.level_embedding.up.weight"] is not None
    assert not any(gradient is not None and gradient.any() for gradient in nothing.values())


def test_order_2_with_a_noise_level_for_each_image():
    case, sweeps = Case(noise="range"), functools.partial(decode_with_sweeps, sweeps=3)
    assert_same(case.both(config("reverse", TWO, 2)), case.expected(TWO, sweeps))


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


@FEW
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
@FEW
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


def test_frozen_parameters_get_no_gradient_and_the_rest_stay_right():
    case = Case()
    expected = case.both(config("reverse", TWO, "exact"))
    frozen = case.flow.blocks[3].body.requires_grad_(False)
    out = case.encode(config("reverse", TWO, "exact"))
    (case.likelihood(out) + case.alignment(out.hidden)).backward()
    assert all(parameter.grad is None for parameter in frozen.parameters())
    found = {name: parameter.grad for name, parameter in case.parameters().items()}
    assert_same(found, {name: g for name, g in expected.items() if "blocks.3.body" not in name})


def test_exact_stops_at_its_tolerance():
    """Error below some ten times the tolerance, with fewer passes than a smaller tolerance takes.

    SwiGLU: such blocks are solved by products on every device.
    """
    case = Case(mlp="swiglu")
    expected = case.both(config("reverse", TWO, "exact"))
    found = case.both(config("reverse", TWO, "exact", tolerance=1e-3))
    assert_same(found, expected, relative=1e-2)
    with pytest.raises(AssertionError):
        assert_same(found, expected, relative=1e-7)


class Shift:
    """N^T of a shift register: no term is smaller than the one before, but that after the last token."""

    def __init__(self, factor=1.0):
        self.calls, self.factor = 0, factor

    def __call__(self, r):
        self.calls += 1
        return self.factor * torch.cat([r[:, 1:], r.new_zeros(2, 1, 1)], dim=1)


LAST = torch.eye(7, dtype=torch.float64)[6].repeat(2, 1)[..., None]


@pytest.mark.parametrize(("order", "calls"), [(0, 0), (2, 2), (6, 6), (50, 6)])
def test_truncated_series_has_at_most_length_minus_one_terms(order, calls):
    shift = Shift()
    total = truncated_series(LAST, shift, order, length=7)
    assert shift.calls == calls
    assert total[0, :, 0].tolist() == [float(6 - i <= calls) for i in range(7)]


@pytest.mark.parametrize("factor", [1.0, 30.0, 0.1])
def test_complete_series_ends_after_length_passes(factor):
    """Terms that stay, grow to 30^6 or fade; 30^6 * eps = 2e-7 is what rounding leaves."""
    shift = Shift(factor)
    total = complete_series(LAST, shift, 1e-12, length=7)
    assert shift.calls <= 7
    expected = factor ** torch.arange(6, -1, -1, dtype=torch.float64)
    assert torch.allclose(total[1, :, 0], expected, rtol=1e-6)


def test_complete_series_of_nothing_and_of_images_that_end_early():
    assert not complete_series(0 * LAST, Shift(), 1e-4, length=7).any()
    start = LAST.clone()
    start[0], start[1, :, 0] = 0, torch.eye(7)[1]  # nothing; two terms; beside the seven of LAST
    start = torch.cat([start, LAST[:1]])
    total = complete_series(start, lambda r: torch.cat([r[:, 1:], r.new_zeros(3, 1, 1)], 1), 1e-12, length=7)
    assert torch.allclose(total[..., 0], torch.tensor([[0.0] * 7, [1.0] * 2 + [0.0] * 5, [1.0] * 7]).double())


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_complete_series_takes_no_more_passes_than_the_plain_sum(tolerance):
    dense = torch.randn(3, 12, 12, dtype=torch.float64).triu(1) / 2
    g = torch.randn(3, 12, 1, dtype=torch.float64)
    calls = []

    def apply(r):
        calls.append(r)
        return dense @ r

    def remainder(u):
        return (g + dense @ u - u).norm() / u.norm()

    found = remainder(complete_series(g, apply, tolerance, length=12))
    assert found <= tolerance * (1 + 1e-9)
    plain = [remainder(truncated_series(g, lambda r: dense @ r, k, length=12)) for k in range(12)]
    assert len(calls) <= next(k for k in range(12) if plain[k] <= tolerance) + 1
    assert found <= plain[len(calls) - 1]


class Sentinel:
    """A backward hook that lives as long as the graph it hangs on."""

    def __call__(self, gradient):
        pass


@pytest.mark.parametrize("with_backward", [True, False])
def test_local_graphs_are_freed_by_reference_counting(with_backward):
    case, seen = Case(), []

    def watch(module, inputs, output):
        sentinel = Sentinel()
        output[0].register_hook(sentinel)
        seen.append(weakref.ref(sentinel))

    handle = case.flow.blocks[3].body.register_forward_hook(watch)
    gc.disable()
    try:
        out = case.encode(config("reverse", TWO, 2))
        loss = case.likelihood(out) + case.alignment(out.hidden)
        assert seen[0]() is not None
        if with_backward:
            loss.backward()
        else:
            del out, loss
        assert seen[0]() is None  # after backward, though out and loss are alive
    finally:
        gc.enable()
        handle.remove()


def test_second_backward_is_refused_in_one_sentence():
    case = Case()
    loss = case.alignment(case.encode(config("reverse")).hidden)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_second_derivative_is_refused():
    case = Case()
    loss = case.alignment(case.encode(config("reverse")).hidden)
    (gradient,) = torch.autograd.grad(loss, [case.flow.blocks[2].proj_in.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("strategy", ["detach", "reverse"])
def test_activation_checkpointing_changes_nothing(strategy):
    """Layers that recompute their activations in every pass of the backward, over the same graph."""
    case = Case()
    expected = case.both(config(strategy, APART, 2))
    for block in case.flow.blocks:
        for layer in block.body.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    assert_same(case.both(config(strategy, APART, 2)), expected, relative=1e-12)


def test_autocast_keeps_the_gradient_near_that_of_fp32():
    """bf16 has 8 bits: the products' rounding, 2^-9 each, leaves gradients some percent off."""
    case = Case(dtype=torch.float32)
    expected = case.both(config("reverse", TWO, 2))
    with torch.autocast("cpu", torch.bfloat16):
        out = case.encode(config("reverse", TWO, 2))
        loss = case.likelihood(out) + case.alignment(out.hidden)
    assert out.z.dtype == out.log_det.dtype == loss.dtype == torch.float32
    found = case.gradients(loss)
    assert all(g is None or g.dtype == torch.float32 for g in found.values())
    assert_same({k: g for k, g in found.items() if expected[k] is not None}, expected, relative=0.1)


def matrix_products(call):
    """Floating point operations of ``call`` in matrix products, without attention."""
    with FlopCounterMode(display=False) as counter:
        call()
    return sum(
        counter.get_flop_counts()["Global"].get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_each_order_costs_one_forward_pass_and_no_weight_gradients(mlp):
    case = Case(dtype=torch.float32, mlp=mlp)
    block = case.flow.blocks[3]
    x = case.flow.tokens(case.images)
    forward = matrix_products(lambda: block(x, block.context(case.labels)))
    costs = [matrix_products(lambda: case.both(config("reverse", ONE, order))) for order in (0, 1, 2)]  # noqa: B023
    assert costs[1] - costs[0] == costs[2] - costs[1] == forward


def test_locations_outside_the_flow_are_refused():
    case = Case()
    for place in ((5, 1), (1, 3), (0, 1)):
        with pytest.raises(InputError, match="outside the model"):
            case.encode(config("reverse", (place,)))


class Objective(torch.nn.Module):
    """Both losses in the forward of one module, as DistributedDataParallel wants it."""

    def __init__(self, flow, projector, alignment):
        super().__init__()
        self.flow, self.projector, self.alignment = flow, projector, alignment

    def forward(self, images, labels, targets):
        out = encode(self.flow, images, labels, None, self.alignment)
        likelihood = -out.log_prob.mean() / self.flow.config.dims
        return likelihood + WEIGHT * alignment_loss(out.hidden, targets, self.projector).loss


def run_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    case = Case(batch=4)
    model = DistributedDataParallel(Objective(case.flow, case.projector, config("reverse", TWO, "exact")))
    own = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):  # the second step uses the buckets that the first one ordered
        model.zero_grad()
        model(case.images[own], case.labels[own], case.targets[own]).backward()
    torch.save({name: p.grad for name, p in case.parameters().items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    """DistributedDataParallel, one backward call; the mean over ranks is that over the whole batch."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(tests), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    case = Case(batch=4)
    model = Objective(case.flow, case.projector, config("reverse", TWO, "exact"))
    expected = case.gradients(model(case.images, case.labels, case.targets))
    for rank in range(2):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected, relative=1e-10)


if __name__ == "__main__":
    run_process(rank=int(sys.argv[2]), folder=sys.argv[1])
