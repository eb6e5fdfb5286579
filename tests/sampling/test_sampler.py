"""What a user of :func:`flowback.sample` relies on."""

import pytest
import torch

from flowback import BlockPlan, Guidance, InputError, sample
from flowback.sampling.sampler import noise, trajectory
from sampling.flows import tame_flow


@pytest.fixture(scope="module")
def flow():
    return tame_flow(torch.float32)


def test_is_the_flow_inverse(flow):
    labels = torch.tensor([0, 3, 4])
    images = sample(flow, labels, [5, 6, 7], denoise=False)
    torch.testing.assert_close(images, flow.inverse(noise(flow, [5, 6, 7]), labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_an_image_depends_on_its_seed_only(flow, guidance):
    """Batch size, neighbours and order change an image by rounding only: 1e-5 in fp32."""
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    whole = sample(flow, labels, range(7), guidance)
    split = sample(flow, labels, range(7), guidance, batch_size=2)
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)
    swapped = sample(flow, labels.flip(0), range(6, -1, -1), guidance).flip(0)
    torch.testing.assert_close(swapped, whole, atol=1e-5, rtol=0)
    assert (whole[0] - whole[5]).abs().max() > 0.1


def test_jacobi_gives_the_same_images(flow):
    exact = sample(flow, [0, 1], denoise=False)
    for plan, allowed in ((BlockPlan(5, "z", None), 1e-5), (BlockPlan(8, "zeros", 1e-4), 1e-3)):
        found = sample(flow, [0, 1], denoise=False, plans=[plan] * 2)
        torch.testing.assert_close(found, exact, atol=allowed, rtol=0)


def test_labels_of_every_form(flow):
    ids = sample(flow, torch.tensor([2, 2]), [0, 1])
    for same in (2, [2, 2], torch.eye(5)[[2, 2]]):
        torch.testing.assert_close(sample(flow, same, [0, 1]), ids, atol=1e-6, rtol=0)
    mean = torch.full((2, 5), 0.2)
    torch.testing.assert_close(sample(flow, None, [0, 1]), sample(flow, mean, [0, 1]), atol=1e-5, rtol=0)
    assert sample(flow, 2).shape == (1, 1, 8, 8)


def test_guidance_away_from_the_unconditional(flow):
    """At w = -1 every prediction is the unconditional one, in the guided blocks."""
    found = sample(flow, [0, 1], guidance=-1.0, denoise=False)
    torch.testing.assert_close(found, sample(flow, None, [0, 1], denoise=False), atol=1e-5, rtol=0)
    partly = sample(flow, [0, 1], guidance=Guidance(-1.0, blocks=1), denoise=False)
    z = noise(flow, [0, 1])
    expected = flow.blocks[1].inverse(z, flow.blocks[1].context(None))
    expected = flow.blocks[0].inverse(expected, flow.blocks[0].context(torch.tensor([0, 1])))
    torch.testing.assert_close(partly, flow.images(expected), atol=1e-5, rtol=0)


def test_attention_temperature_guides_without_labels():
    flow = tame_flow(torch.float32, num_classes=0)
    plain = sample(flow, seeds=[0, 1])
    assert not torch.allclose(sample(flow, seeds=[0, 1], guidance=Guidance(1.0, temperature=1.5)), plain)
    with pytest.raises(InputError, match="attention temperature"):
        sample(flow, seeds=[0, 1], guidance=1.0)


def test_trajectory_ends_in_the_sample(flow):
    states = trajectory(flow, [0, 1])
    assert len(states) == 4  # z, two blocks, denoised
    torch.testing.assert_close(states[0], flow.images(noise(flow, [0, 1])))
    torch.testing.assert_close(states[-1], sample(flow, [0, 1]))
    torch.testing.assert_close(states[-2], sample(flow, [0, 1], denoise=False))


def test_noise_is_one_stream_a_seed(flow):
    assert torch.equal(noise(flow, [3, 9])[1], noise(flow, [9])[0])
    assert not torch.equal(noise(flow, [3], redraw=1), noise(flow, [3]))
    assert not torch.equal(noise(flow, [3], redraw=1), noise(flow, [3], redraw=2))
    assert noise(flow, range(400)).std().item() == pytest.approx(1, abs=0.02)  # 3 deviations of 25,600 values


def test_leaves_the_flow_as_it_was(flow):
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    sample(flow, [0], guidance=1.0)
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert all(parameter.grad is None for parameter in flow.parameters())


@pytest.mark.parametrize(
    ("labels", "seeds", "message"),
    [
        ([0, 1, 2], [0, 1], "3 labels for 2 seeds"),
        ([0], [0, 1], "1 labels for 2 seeds"),
        ([0, 5], [0, 1], "out of range"),
        ([0], [-1], "Seed -1"),
        (None, [2**32], "out of range"),
        (0, [], "no seeds"),
    ],
)
def test_bad_input(flow, labels, seeds, message):
    with pytest.raises(InputError, match=message):
        sample(flow, labels, seeds)


def test_guidance_without_labels_is_refused(flow):
    with pytest.raises(InputError, match="give labels"):
        sample(flow, None, [0], guidance=1.0)
    with pytest.raises(InputError, match="guided blocks"):
        sample(flow, [0], guidance=Guidance(1.0, blocks=3))
