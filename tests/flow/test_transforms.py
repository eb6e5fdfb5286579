"""A flow under PyTorch's tools: torch.func, torch.compile, copies and other processes. In float64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import runs
from flowback import Flow, ModelConfig

CONFIG = ModelConfig(
    image_size=8, channels=1, patch_size=4, width=16, blocks=2, layers=2, head_dim=8, num_classes=3
)
EXACT = {"rtol": 0, "atol": 1e-12}  # the same sums in another order, values of about 1 to 100


@pytest.fixture
def flow():
    """Of float64, and off its initial weights, at which the blocks are the identity."""
    made = Flow(CONFIG, ("a", "b", "c")).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@pytest.fixture
def batch():
    return torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1, torch.tensor([2, 0, 1])


def log_prob(flow, weights, image, label):
    return functional_call(flow, weights, (image[None], label[None])).log_prob.sum()


def test_grad_is_the_gradient(flow, batch):
    images, labels = batch
    point = images.clone().requires_grad_()
    (expected,) = torch.autograd.grad(flow(point, labels).log_prob.sum(), point)
    found = grad(lambda x: flow(x, labels).log_prob.sum())(images)
    assert torch.allclose(found, expected, **EXACT)


def test_vmap_gives_each_image_its_own_gradient(flow, batch):
    weights = dict(flow.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        found = vmap(grad(lambda *own: log_prob(flow, *own)), (None, 0, 0))(weights, *batch)
    for row, (image, label) in enumerate(zip(*batch, strict=True)):
        expected = torch.autograd.grad(log_prob(flow, weights, image, label), list(weights.values()))
        for name, gradient in zip(weights, expected, strict=True):
            assert torch.allclose(found[name][row], gradient, **EXACT), name


def test_second_derivatives_by_torch_func_are_right(flow, batch):
    """Against central differences of the gradient: their error is of the order of 1e-5 squared."""
    image, label = batch[0][0], batch[1][0]
    weights = dict(flow.named_parameters())
    score = grad(lambda x: log_prob(flow, weights, x, label))
    direction, step = torch.randn_like(image), 1e-5
    with sdpa_kernel(SDPBackend.MATH):
        hessian = jacrev(score)(image).reshape(64, 64)
        change = (score(image + step * direction) - score(image - step * direction)) / (2 * step)
    assert torch.allclose(hessian @ direction.flatten(), change.flatten(), rtol=0, atol=1e-6)


def test_the_score_can_be_differentiated_again_by_autograd(flow, batch):
    """By images and weights, as a penalty on the score needs, against torch.func."""
    images, labels = batch
    weights = dict(flow.named_parameters())

    def penalty(own, x):
        return grad(lambda y: functional_call(flow, own, (y, labels)).log_prob.sum())(x).square().sum()

    point = images.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        expected = grad(penalty, argnums=(0, 1))(weights, images)
        (score,) = torch.autograd.grad(flow(point, labels).log_prob.sum(), point, create_graph=True)
        found = torch.autograd.grad(score.square().sum(), [point, *weights.values()], allow_unused=True)
    assert torch.allclose(found[0], expected[1], rtol=1e-9, atol=1e-9)
    for (name, weight), gradient in zip(expected[0].items(), found[1:], strict=True):
        gradient = torch.zeros_like(weight) if gradient is None else gradient
        assert torch.allclose(gradient, weight, rtol=1e-9, atol=1e-9), name


def test_gradients_of_weights_by_autograd_are_not_differentiated_in_silence(flow, batch):
    with pytest.raises(RuntimeError, match=r"take such second derivatives with torch\.func"):
        torch.autograd.grad(flow(*batch).log_prob.sum(), list(flow.parameters()), create_graph=True)


def test_compiled_whole_it_is_the_same(tmp_path):
    """In one graph; in a process of its own, since the tests' checks of shapes cannot be traced."""
    codes = runs.run(runs.compiled_and_plain, log=tmp_path / "log")
    assert codes == [0], runs.printed(tmp_path / "log")


def test_a_deep_copy_is_a_flow_of_its_own(flow, batch):
    copied = copy.deepcopy(flow)
    assert copied.classes == flow.classes
    assert torch.equal(copied(*batch).z, flow(*batch).z)
    with torch.no_grad():
        copied.blocks[0].proj_in.weight.zero_()
    assert not torch.equal(copied(*batch).z, flow(*batch).z)


def test_pickled_to_another_process_it_is_the_same(flow, batch, tmp_path):
    file = tmp_path / "z.pt"
    codes = runs.run(runs.encode_pickled, pickle.dumps((flow, *batch)), file, log=tmp_path / "log")
    assert codes == [0], runs.printed(tmp_path / "log")
    assert torch.equal(torch.load(file), flow(*batch).z)


def test_in_bfloat16_only_the_transformers_are_narrow(flow, batch):
    """Shift, log-scale, z and log-determinant stay fp32, so the density is near that of fp32.

    What is left is the Transformers' rounding, and that of the weights: 8 bits, some 0.01 nats a dimension on
    this flow of random weights; three times that is allowed.
    """
    images, labels = batch
    wide, narrow = flow.float(), copy.deepcopy(flow).bfloat16()
    expected, found = (made(images.float(), labels) for made in (wide, narrow))
    assert (found.z.dtype, found.log_det.dtype) == (torch.float32, torch.float32)
    assert (found.log_prob - expected.log_prob).abs().max() < 0.03 * CONFIG.dims
    again = narrow.inverse(found.z, labels)
    assert torch.allclose(again, images.float(), rtol=0, atol=0.02)  # a token at a time rounds otherwise
    assert narrow.sample(["a", "c"], seeds=[0, 1]).dtype == torch.float32
