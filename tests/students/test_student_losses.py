"""What students learn, against formulas written out by hand; in float64."""

import pytest
import torch

from flowback.students.losses import encode_states, inverse_losses, matching_losses, state_rms, times
from sampling.flows import tame_flow
from students.test_student_network import RMS, noise, student_of

LABELS, DROP = torch.tensor([1, 2]), torch.tensor([False, True])


def test_targets_are_the_states_of_the_encode_pass():
    """The last is z, and each block undoes its own step."""
    flow = tame_flow(num_classes=3)
    config = flow.config
    images = torch.randn(2, config.channels, config.image_size, config.image_size, dtype=torch.float64)
    states = encode_states(flow, images, LABELS, DROP)
    assert torch.equal(states[0], flow.tokens(images))
    assert torch.equal(states[-1], flow(images, LABELS, DROP).z.detach())
    for block, x, z in zip(flow.blocks, states, states[1:], strict=False):
        assert torch.allclose(block.inverse(z, block.context(LABELS, DROP)), x, atol=1e-9)
    assert not any(x.requires_grad for x in states)


def test_inverse_losses_are_mean_squares_of_scaled_and_clipped_states():
    student, clean = student_of(clip=1.5), noise()
    states = [noise(), noise(), noise()]
    parts, predicted = inverse_losses(student, states, clean, LABELS, DROP, torch.zeros(2))
    image, hidden = student(states[2], LABELS, DROP)
    first, second = student.states(hidden)
    assert torch.equal(predicted, image)
    expected = {
        "image": ((image - clean) / RMS[0]).clone(),
        "hidden_1": first - (states[1] / RMS[1]).clamp(-1.5, 1.5),
        "hidden_2": second - (states[0] / RMS[0]).clamp(-1.5, 1.5),
    }
    # Clean images, within [-1, 1] by themselves, are not clipped: some of these are larger.
    assert (clean / RMS[0]).abs().max() > 1.5
    assert parts.keys() == expected.keys()
    for name, difference in expected.items():
        assert parts[name].item() == pytest.approx(difference.square().mean().item(), rel=1e-12)


def test_guidance_moves_the_targets_away_from_the_output_without_label():
    """A chance of 0.75 is half of the largest scale; below 0.5, and without label, there is none."""
    student, clean = student_of(guidance=3.0), noise(3)
    states, labels, drop = (
        [noise(3), noise(3), noise(3)],
        torch.tensor([1, 2, 0]),
        torch.tensor([False, True, False]),
    )
    parts, _ = inverse_losses(student, states, clean, labels, drop, torch.tensor([0.75, 0.75, 0.3]).double())
    number = torch.tensor([0.5, 0, 0]).double()
    without, _ = student(states[2])
    target = clean + 3.0 * number[:, None, None] * (clean - without)
    image, _ = student(states[2], labels, drop, number)
    assert parts["image"].item() == pytest.approx(
        ((image - target) / RMS[0]).square().mean().item(), rel=1e-12
    )


def test_matching_is_the_velocity_between_image_and_noise():
    student, clean, z = student_of("matching"), noise(), noise()
    chance = torch.tensor([0.2, 0.9], dtype=torch.float64)
    t = times(chance)
    parts = matching_losses(student, z, clean, LABELS, DROP, chance)
    at = t[:, None, None]
    v, _ = student(at * z + (1 - at) * clean, LABELS, DROP, t)
    assert parts["velocity"].item() == pytest.approx((v - z + clean).square().mean().item(), rel=1e-12)


def test_times_are_logit_normal():
    """Quartiles of the logit of 10,001 even chances, against −0.2 ± 0.6745; the ends stay inside (0, 1)."""
    t = times(torch.linspace(0, 1, 10_001, dtype=torch.float64))
    quartiles = torch.logit(t[[2500, 5000, 7500]])
    assert quartiles.tolist() == pytest.approx([-0.87449, -0.2, 0.47449], abs=1e-4)
    assert 0 < t[0] < t[-1] < 1


def test_sizes_of_states_have_four_digits():
    assert state_rms([torch.full((2, 3, 4), 1.23456), torch.full((2, 3, 4), -3.0)]) == (1.235, 3.0)
