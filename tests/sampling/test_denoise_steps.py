"""Denoising down the levels of a flow with a range of them, in float64 where values are compared."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowback import Denoising, InputError, SampleConfig, Sampler, sample
from flowback.flow.frozen import frozen
from flowback.sampling.denoise import denoise, denoised_states
from flowback.sampling.sampler import noise
from flowback.sampling.solver import spaced_levels
from reference import random_images
from sampling.flows import tame_flow

RANGE = {"noise": "range", "noise_min": 0.05, "noise_max": 0.5}
LABELS = torch.tensor([1, 4, 2])


@pytest.fixture(scope="module")
def flow():
    return tame_flow(**RANGE)


def clean_by_hand(flow, x, labels, t):
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(flow(x, labels, noise=t).log_prob.sum(), x)
    return (x + t**2 * score).detach()


@pytest.mark.parametrize("method", ["euler", "heun", "stochastic"])
def test_one_step_with_one_level_is_one_application_of_tweedies_formula(flow, method):
    """To the bit: that of a flow with one level, and that of a range at the level drawn at."""
    for own, level in ((tame_flow(), None), (flow, 0.2)):
        drawn = sample(own, LABELS, [5, 6, 7], denoise=False, noise=level)
        found = sample(own, LABELS, [5, 6, 7], denoise=Denoising(1, method), noise=level)
        assert torch.equal(found, denoise(own, drawn, LABELS, noise=level))
    own = tame_flow()
    assert torch.equal(sample(own, 2, [7]), sample(own, 2, [7], denoise=Denoising(1)))


def test_steps_by_hand(flow):
    """Euler's at linear levels, from the density itself: to 1e-12, other orders of sums."""
    x = images = random_images(flow, 3)
    levels = (0.3, 0.175, 0.05)
    states = denoised_states(flow, images, LABELS, Denoising(3), noise=0.3)
    for t, after, state in zip(levels, (*levels[1:], 0.0), states, strict=True):
        x = x + (after - t) * (x - clean_by_hand(flow, x, LABELS, t)) / t
        torch.testing.assert_close(state, x, atol=1e-12, rtol=0)


def test_guidance_and_clamp_act_on_the_clean_image(flow):
    images = 2 * random_images(flow, 3)
    c, u = (clean_by_hand(flow, images, labels, 0.5) for labels in (LABELS, None))
    (found,) = denoised_states(flow, images, LABELS, Denoising(1, guidance=1.5))
    torch.testing.assert_close(found, c + 1.5 * (c - u), atol=1e-12, rtol=0)
    (found,) = denoised_states(flow, images, LABELS, Denoising(1, guidance=1.5, clamp=True))
    assert (found.abs() == 1).any()
    torch.testing.assert_close(found, (c + 1.5 * (c - u)).clamp(-1, 1), atol=1e-12, rtol=0)


def test_default_levels(flow):
    assert Sampler(flow).levels == spaced_levels(0.5, 0.05, 10)
    assert Sampler(flow, noise=0.3).levels[0] == 0.3
    assert Sampler(flow, noise=0.05).levels == (0.05,)
    assert Sampler(flow, denoise=False).levels == ()
    assert Sampler(flow, denoise=Denoising(3, spacing="log", last=0.125)).levels == (0.5, 0.25, 0.125)
    assert Sampler(tame_flow()).levels == (0.05,)
    assert Sampler(tame_flow(noise="uniform")).levels == ()
    config = SampleConfig(
        noise=0.4, denoise_steps=3, denoise_method="heun", denoise_spacing="edm", denoise_last=0.1,
        denoise_clamp=True, denoise_guidance=0.5,
    )  # fmt: skip
    sampler = Sampler.from_config(flow, config)
    assert sampler.denoising == Denoising(3, "heun", "edm", 0.1, True, 0.5)
    assert sampler.levels == spaced_levels(0.4, 0.1, 3, "edm")


@pytest.mark.parametrize("method", ["heun", "stochastic"])
def test_an_image_depends_on_its_seed_only(flow, method):
    """Batch size and neighbours change it by rounding: 1e-10 in float64."""
    options = {"guidance": 1.0, "denoise": Denoising(3, method, guidance=0.5)}
    whole = sample(flow, [0, 1, 2, 3, 4], [9, 8, 7, 6, 5], **options)
    split = sample(flow, [0, 1, 2, 3, 4], [9, 8, 7, 6, 5], batch_size=2, **options)
    torch.testing.assert_close(split, whole, atol=1e-10, rtol=0)
    alone = sample(flow, 3, [6], **options)
    torch.testing.assert_close(alone, whole[3:4], atol=1e-10, rtol=0)
    other = Sampler(flow, **options)(3, [6], redraw=1)
    assert (other - alone).abs().max() > 0.1


def test_stochastic_steps_have_noise_of_their_own(flow):
    """One stream for each seed, redraw and step; step 0 is what it was before there were steps."""
    streams = [noise(flow, [3], redraw, step) for redraw in (0, 1) for step in (0, 1, 2)]
    for place, stream in enumerate(streams):
        assert all((stream - other).abs().max() > 0.1 for other in streams[:place])
    assert torch.equal(noise(flow, [4, 3], step=1)[1], streams[1][0])
    for redraw in (1, 2):
        seed = int(np.random.SeedSequence((3, redraw)).generate_state(1)[0])
        assert torch.equal(noise(flow, [3], redraw), noise(flow, [seed]))


def test_trajectory_has_every_step(flow):
    states = Sampler(flow, denoise=Denoising(4)).trajectory([0, 1])
    assert len(states) == 1 + 2 + 4  # z, two blocks, four steps
    torch.testing.assert_close(states[-1], sample(flow, [0, 1], denoise=Denoising(4)))


def test_what_only_gradients_of_weights_need_is_not_kept(flow):
    """A score keeps fewer bytes than a training step, and leaves no gradient at the weights."""
    images = random_images(flow, 3)
    kept = {}
    for name, encode in (("all", flow), ("frozen", frozen(flow))):
        sizes = kept[name] = []
        pack = lambda tensor, sizes=sizes: sizes.append(tensor.nbytes) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            encode(images.clone().requires_grad_(), LABELS, noise=0.2)
    assert sum(kept["frozen"]) < 0.8 * sum(kept["all"])
    denoise(flow, images, LABELS, noise=0.2)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in flow.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sampler(tame_flow(), denoise=Denoising(5)), "one noise level, 0.05, .*--model.noise range"),
        (lambda: Sampler(tame_flow(), denoise=Denoising(last=0.01)), "one noise level, 0.05"),
        (lambda: Sampler(tame_flow(noise="uniform"), denoise=Denoising(2)), "knows no noise level"),
        (lambda: Denoising(0), "--denoise-steps is 0"),
        (lambda: Denoising(guidance=float("nan")), "--denoise-guidance is nan"),
        (lambda: Sampler(tame_flow(**RANGE), denoise=Denoising(last=0.01)), "0.01 is outside the range"),
        (lambda: Sampler(tame_flow(**RANGE), denoise=Denoising(3, last=0.5)), "0.5, 0.5 do not decrease"),
        (lambda: Sampler(tame_flow(**RANGE), noise=0.1, denoise=Denoising(last=0.2)), "0.1, 0.2 do not"),
        (lambda: sample(tame_flow(**RANGE), None, [0], denoise=Denoising(guidance=1.0)), "give labels"),
        (lambda: Denoising(clamp=True).check(True, latent=True), "latents go beyond"),
        (lambda: SampleConfig(denoise_steps=0), "--denoise-steps is 0"),
        (lambda: SampleConfig(denoise=False, denoise_steps=3), "--no-denoise leaves out"),
        (lambda: SampleConfig(denoise_last=0.0), "--denoise-last must be above 0"),
        (lambda: SampleConfig(noise=0.1, denoise_last=0.2), "--noise 0.1 to --denoise-last 0.2 do not"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_method_or_spacing_that_does_not_exist():
    """Past the checks of types, which are on in tests only."""
    good = {"method": "euler", "spacing": "log", "steps": 1, "guidance": 0.0}
    for changed, message in (({"method": "rk4"}, "method of denoising rk4"), ({"spacing": "cos"}, "cos")):
        with pytest.raises(InputError, match=message):
            Denoising.__post_init__(SimpleNamespace(**{**good, **changed}))
