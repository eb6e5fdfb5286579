from __future__ import annotations

import math
from inspect import unwrap

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flowback import Flow, InputError, ModelConfig, classify
from flowback.flow import TARFlow
from flowback.sampling.editing import inpaint, interpolate
from reference import ReferenceFlow, random_flow, random_images

VARIANTS = [
    pytest.param({}, id="learned-gelu"),
    pytest.param({"position": "rope", "mlp": "swiglu"}, id="rope-swiglu"),
    pytest.param({"qk_norm": True, "num_classes": 0}, id="qk-norm-unconditional"),
    pytest.param({"channels": 3, "patch_size": 4, "blocks": 3}, id="colour-three-blocks"),
    pytest.param({"blocks": 3, "layers": (2, 1, 3), "patch_size": 4}, id="uneven"),
    pytest.param({"log_scale_bound": 0.2}, id="bounded"),
]


def some_labels(flow: Flow) -> Tensor | None:
    return torch.tensor([4, 1]) if flow.config.num_classes else None


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoding_equals_the_reference(variant):
    flow = random_flow(**variant)
    images, labels = random_images(flow, 2), some_labels(flow)
    last = list(enumerate(flow.config.depths, start=1))
    out = flow(images, labels, hidden=last)
    reference = ReferenceFlow(flow)
    for row in range(2):
        z, log_det, hidden = reference.encode(images[row], None if labels is None else int(labels[row]))
        torch.testing.assert_close(out.z[row], z, rtol=0, atol=1e-9)
        torch.testing.assert_close(out.log_det[row], log_det, rtol=0, atol=1e-9)
        for place, states in zip(last, hidden, strict=True):
            torch.testing.assert_close(out.hidden[place][row], states, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_decoding_equals_the_uncached_reference(variant):
    flow = random_flow(**variant)
    config, labels = flow.config, some_labels(flow)
    z = torch.randn(2, config.tokens, config.token_dim, dtype=torch.float64)
    images = flow.inverse(z, labels)
    expected = ReferenceFlow(flow).decode(z[1], None if labels is None else int(labels[1]))
    torch.testing.assert_close(images[1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inverse_undoes_forward_in_float64(variant):
    flow = random_flow(**variant)
    images, labels = random_images(flow, 2), some_labels(flow)
    out = flow(images, labels)
    torch.testing.assert_close(flow.inverse(out.z, labels), images, rtol=0, atol=1e-9)


def test_inverse_undoes_forward_in_float32_through_eight_blocks():
    flow = random_flow(torch.float32, blocks=8, width=64, scale=0.02)
    images = random_images(flow, 4)
    out = flow(images, torch.arange(4))
    assert out.log_det.abs().min() > 1  # not the identity
    assert (flow.inverse(out.z, torch.arange(4)) - images).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_det_is_that_of_the_autograd_jacobian(variant):
    flow = random_flow(**variant)
    images, labels = random_images(flow, 2), some_labels(flow)
    log_det = flow(images, labels).log_det
    for row in range(2):
        label = None if labels is None else labels[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(lambda x, y=label: flow(x, y).z, images[row : row + 1])
        expected = torch.linalg.slogdet(jacobian.reshape(flow.config.dims, flow.config.dims))
        torch.testing.assert_close(log_det[row], expected.logabsdet, rtol=0, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant):
    flow = random_flow(**variant)
    flow(random_images(flow, 2), some_labels(flow)).log_prob.sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_new_flow_is_the_identity_up_to_the_bias_and_has_the_gaussians_density():
    flow = Flow(
        ModelConfig(image_size=8, channels=1, patch_size=2, width=32, blocks=3, layers=1, head_dim=16)
    )
    for block in flow.blocks:
        assert not block.proj_out.weight.any()
        assert block.proj_out.bias.any()
        torch.nn.init.zeros_(block.proj_out.bias)
    images = torch.randn(3, 1, 8, 8)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(images).sum(dim=(1, 2, 3))
    torch.testing.assert_close(flow.log_prob(images), expected)
    torch.testing.assert_close(flow.images(flow(images).z), images, rtol=0, atol=0)


def test_log_prob_integrates_to_one():
    # One token of one dimension passes unchanged, so use two: p(x1, x2) on a grid that holds all the mass.
    flow = random_flow(image_size=2, patch_size=1, num_classes=0, layers=1)
    axis = torch.linspace(-12, 12, 241, dtype=torch.float64)
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    images = torch.zeros(axis.numel() ** 2, 1, 2, 2, dtype=torch.float64)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = first.flatten(), second.flatten()
    block = flow.blocks[0]
    with torch.no_grad():  # marginal of the first two tokens, through the first block alone
        z, log_det, prediction = block(flow.tokens(images), None)
        log_scale = prediction.log_scale
    log_p = (
        -0.5 * z[:, :2].square().sum(dim=(1, 2)) - math.log(2 * math.pi) - log_scale[:, :2].sum(dim=(1, 2))
    )
    assert torch.isfinite(log_det).all()
    # trapezoid rule, step 0.1, smooth integrand: far below 1e-6
    assert log_p.exp().sum().item() * 0.1**2 == pytest.approx(1, abs=1e-6)


def test_unconditional_is_the_mean_of_the_class_tables_in_both_directions():
    flow = random_flow()
    images = random_images(flow, 2)
    mean = random_flow()
    with torch.no_grad():
        for block in mean.blocks:
            block.class_table.copy_(block.class_table.mean(0).expand_as(block.class_table))
    out = flow(images)
    torch.testing.assert_close(out.z, mean(images, torch.tensor([0, 3])).z, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.inverse(out.z), images, rtol=0, atol=1e-9)
    assert not torch.allclose(flow.inverse(out.z, [4, 4]), images)
    with torch.no_grad():  # the reference has one image at a time, and no labels either
        expected, _, _ = ReferenceFlow(flow).encode(images[0], None)
    torch.testing.assert_close(out.z[0], expected, rtol=0, atol=1e-9)


def test_one_hot_weights_equal_ids_and_even_weights_equal_none():
    flow = random_flow()
    images, ids = random_images(flow, 2), torch.tensor([4, 1])
    one_hot, even = F.one_hot(ids, 5).double(), torch.full((2, 5), 0.2, dtype=torch.float64)
    for soft, plain in ((one_hot, ids), (even, None)):
        torch.testing.assert_close(flow(images, soft).z, flow(images, plain).z, rtol=0, atol=1e-12)
        z = flow(images, plain).z
        torch.testing.assert_close(flow.inverse(z, soft), images, rtol=0, atol=1e-9)


def test_dropped_labels_are_unconditional():
    flow = random_flow()
    images, labels = random_images(flow, 3), torch.tensor([0, 1, 2])
    out = flow(images, labels, drop=torch.tensor([True, False, True]))
    torch.testing.assert_close(out.z[::2], flow(images[::2]).z, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.z[1:2], flow(images[1:2], labels[1:2]).z, rtol=0, atol=1e-12)


def test_an_image_does_not_depend_on_its_batch():
    flow = random_flow()
    images, labels = random_images(flow, 5), torch.arange(5)
    out = flow(images, labels)
    alone = flow(images[2:3], labels[2:3])
    torch.testing.assert_close(out.z[2:3], alone.z, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.log_det[2:3], alone.log_det, rtol=0, atol=1e-12)
    decoded = flow.inverse(out.z, labels)[2:3]
    torch.testing.assert_close(decoded, flow.inverse(alone.z, labels[2:3]), rtol=0, atol=1e-12)


def test_no_argument_is_mutated():
    flow = random_flow()
    images, labels, drop = random_images(flow, 2), torch.tensor([4, 1]), torch.tensor([True, False])
    weights = F.one_hot(labels, 5).double()
    z = flow(images, labels).z.detach()
    arguments = (images, labels, drop, weights, z)
    copies = [argument.clone() for argument in arguments]
    state = {name: value.clone() for name, value in flow.state_dict().items()}
    flow(images, labels, drop, hidden=[(1, 1)])
    flow(images, weights)
    flow.inverse(z, labels)
    flow.inverse(z, weights)
    flow.log_prob(images, labels)
    for argument, copy in zip(arguments, copies, strict=True):
        assert torch.equal(argument, copy)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_autocast_keeps_the_affine_transform_in_float32():
    flow = random_flow(torch.float32)
    images, labels = random_images(flow, 2), torch.tensor([4, 1])
    exact = flow(images, labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = flow(images, labels)
        predicted = flow.blocks[0].predict(flow.tokens(images), flow.blocks[0].context(labels))
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is on
    for value in (out.z, out.log_det, out.log_prob, predicted.shift, predicted.log_scale):
        assert value.dtype == torch.float32
    # bf16 has 8 bits of mantissa; the output projection itself is not rounded to it
    torch.testing.assert_close(out.z, exact.z, rtol=0, atol=0.05)
    assert not torch.equal(predicted.shift, predicted.shift.bfloat16().float())


def test_hidden_states_are_those_asked_for():
    flow = random_flow()
    images = random_images(flow, 2)
    out = flow(images, hidden=[(1, 2), (2, 1)])
    assert set(out.hidden) == {(1, 2), (2, 1)}
    assert flow(images).hidden == {}
    assert torch.equal(out.hidden[1, 2], flow(images, hidden=[(1, 2)]).hidden[1, 2])


def test_labels_may_be_a_list_an_id_for_all_or_a_tensor():
    flow = random_flow()
    assert flow.labels([4, 1], 2).tolist() == [4, 1]
    assert flow.labels(3, 2).tolist() == [3, 3]
    assert flow.labels(torch.tensor([1, 2], dtype=torch.int32), 2).dtype == torch.int64
    assert flow.labels(None, 2) is None
    assert flow.labels(torch.eye(5)[:2], 2).dtype == torch.float64
    images = random_images(flow, 2)
    assert torch.equal(flow(images, [4, 1]).z, flow(images, torch.tensor([4, 1])).z)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, 5], r"Label 5 is out of range: the model's classes go from 0 to 4"),
        ([-1, 0], r"Label -1 is out of range: the model's classes go from 0 to 4"),
        ([0], r"1 labels for 2 images; give one label per image"),
        (torch.ones(2, 3), r"Class weights have shape \(2, 3\); the model has 5 classes"),
        (torch.zeros(2, 5, dtype=torch.int64), r"Labels have shape \(2, 5\)"),
    ],
)
def test_bad_labels_are_refused_in_both_directions(labels, sentence):
    flow = random_flow()
    z = torch.zeros(2, 16, 4, dtype=torch.float64)
    with pytest.raises(InputError, match=sentence):
        flow.inverse(z, labels)
    with pytest.raises(InputError, match=sentence):
        flow.log_prob(random_images(flow, 2), labels)


def test_labels_for_an_unconditional_model_are_refused():
    flow = random_flow(num_classes=0)
    with pytest.raises(InputError, match="This model is unconditional"):
        flow.inverse(torch.zeros(2, 16, 4, dtype=torch.float64), [0, 1])


def test_images_of_another_size_are_refused():
    flow = random_flow()
    with pytest.raises(InputError, match=r"takes images of shape \(B, 1, 8, 8\), not \(2, 1, 16, 16\)"):
        flow(torch.zeros(2, 1, 16, 16, dtype=torch.float64))


DOORS = [  # without the check of shapes that only tests have
    pytest.param(unwrap(TARFlow.forward), id="forward"),
    pytest.param(unwrap(TARFlow.log_prob), id="log_prob"),
    pytest.param(lambda flow, images: unwrap(Flow.add_noise)(flow, images, [0, 1]), id="add_noise"),
    pytest.param(unwrap(classify), id="classify"),
    pytest.param(lambda flow, images: unwrap(interpolate)(flow, images, images), id="interpolate"),
    pytest.param(lambda flow, images: unwrap(inpaint)(flow, images, torch.ones(4, 4) > 0), id="inpaint"),
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"on \[-1, 1\], not uint8; give flowback.to_unit_range"),
        (np.zeros((2, 1, 8, 8), np.float32), "as a tensor, not ndarray"),
        ([[0.0]], "as a tensor, not list"),
        (torch.zeros(2, 1, 16, 16), r"not \(2, 1, 16, 16\)"),
    ],
)
def test_images_of_another_kind_are_refused(door, images, sentence):
    """8-bit values would be taken for [-1, 1]: other figures without a word."""
    with pytest.raises(InputError, match=sentence):
        door(random_flow(), images)


def test_hidden_states_that_do_not_exist_are_refused():
    flow = random_flow()
    with pytest.raises(InputError, match=r"hidden: \(9, 2\) is outside the model; blocks go from 1 to"):
        flow(random_images(flow, 1), hidden=[(1, 1), (9, 2)])


@pytest.mark.parametrize("drop", [None, torch.tensor([True, False])])
def test_blocks_one_after_another(drop):
    """Each output is that of the block alone, and a block that is not asked for does not run."""
    flow, labels = random_flow(), torch.tensor([4, 1])
    images = random_images(flow, 2)
    whole = flow(images, labels, drop, hidden=[(2, 1)])
    x, log_det = flow.tokens(images), 0.0
    for block, output in zip(flow.blocks, flow.encode_blocks(x, labels, drop, hidden=[(2, 1)]), strict=True):
        alone = block(x, block.context(labels, drop))
        prediction = block.predict(x, block.context(labels, drop))
        assert torch.equal(output.z, alone.z)
        assert torch.equal(output.log_det, alone.log_det)
        assert torch.equal(output.prediction.log_scale, prediction.log_scale)
        x, log_det = output.z, log_det + output.log_det
    assert torch.equal(x, whole.z)
    assert torch.equal(log_det, whole.log_det)
    assert torch.equal(output.hidden[1], whole.hidden[2, 1])
    flow.blocks[1].proj_in.register_forward_hook(lambda *_: pytest.fail("the second block ran"))
    next(flow.encode_blocks(flow.tokens(images), labels))
