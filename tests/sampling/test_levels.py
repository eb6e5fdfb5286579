"""Drawing, denoising and planning at a noise level, for flows with a range of them (float64)."""

import dataclasses

import pytest
import torch

from flowback import BlockPlan, InputError, SampleConfig, Sampler, sample
from flowback.sampling import cuda_graph, decoder, native
from flowback.sampling.block_plan import wanted
from flowback.sampling.denoise import denoise, denoises
from flowback.sampling.guidance import Guidance
from flowback.sampling.sampler import noise
from reference import random_images
from sampling.flows import tame_flow

RANGE = {"noise": "range", "noise_min": 0.05, "noise_max": 0.5}
LABELS = torch.tensor([1, 4, 2])


def way(name, monkeypatch):
    """One way to decode: compiled, by PyTorch, as CUDA graphs (run, not recorded), or by Jacobi sweeps."""
    if name == "captured":
        monkeypatch.setattr(decoder, "captures", lambda _: True)
        monkeypatch.setattr(cuda_graph, "cuda_graph", lambda run: run)
    if name in ("captured", "torch"):
        monkeypatch.setattr(native, "library", lambda: None)
    return (BlockPlan(4, tolerance=None),) * 2 if name == "jacobi" else None


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("name", ["compiled", "torch", "captured", "jacobi"])
def test_every_way_of_decoding_takes_the_level(name, classes, monkeypatch):
    """To 1e-12: the same sums in another order. Two levels, one after the other."""
    flow, plans = tame_flow(num_classes=classes, **RANGE), way(name, monkeypatch)
    labels = LABELS if classes else None
    for level in (0.05, 0.3):
        found = sample(flow, labels, [0, 1, 2], denoise=False, plans=plans, noise=level)
        expected = flow.inverse(noise(flow, [0, 1, 2]), labels, noise=level)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(found, flow.inverse(noise(flow, [0, 1, 2]), labels, noise=0.5), atol=1e-3)


@pytest.mark.parametrize("classes", [0, 5])
def test_guidance_keeps_the_level_in_both_streams(classes):
    """At w = -1 every prediction is the unconditional one, at the same level."""
    flow = tame_flow(num_classes=classes, **RANGE)
    labels = LABELS if classes else None
    guidance = Guidance(-1.0, temperature=1.0 if classes else 1.0001)
    found = sample(flow, labels, [0, 1, 2], guidance, denoise=False, noise=0.1)
    expected = flow.inverse(noise(flow, [0, 1, 2]), noise=0.1)
    torch.testing.assert_close(found, expected, atol=1e-10 if classes else 1e-3, rtol=0)


def test_the_default_level_is_the_highest():
    flow = tame_flow(**RANGE)
    assert torch.equal(sample(flow, 1, [7]), sample(flow, 1, [7], noise=0.5))
    assert Sampler(flow).noise == 0.5
    assert Sampler(tame_flow()).noise is None
    assert Sampler.from_config(flow, SampleConfig(noise=0.2)).noise == 0.2


def test_denoising_is_the_score_step_of_each_images_level():
    flow, levels = tame_flow(**RANGE), torch.tensor([0.05, 0.2, 0.5], dtype=torch.float64)
    assert denoises(flow)
    x = random_images(flow, 3).requires_grad_()
    (score,) = torch.autograd.grad(flow(x, LABELS, noise=levels).log_prob.sum(), x)
    expected = x + levels.square()[:, None, None, None] * score
    for chunk in (None, 2):
        found = denoise(flow, x.detach(), LABELS, chunk, noise=levels)
        torch.testing.assert_close(found, expected.detach(), atol=1e-12, rtol=0)
    with torch.inference_mode():
        found = denoise(flow, x.detach().clone(), LABELS.clone(), noise=levels.clone())
    torch.testing.assert_close(found, expected.detach(), atol=1e-12, rtol=0)


def test_levels_that_the_flow_does_not_have_are_refused_before_the_work():
    with pytest.raises(InputError, match=r"0\.6 is outside the range that the flow is trained on, 0.05 to"):
        Sampler(tame_flow(**RANGE), noise=0.6)
    with pytest.raises(InputError, match=r"0\.2 is not that of this flow, which knows only 0.05"):
        Sampler(tame_flow(), noise=0.2)
    with pytest.raises(InputError, match="give the level"):
        denoise(tame_flow(**RANGE), random_images(tame_flow(), 1))


def test_a_plan_holds_for_its_level():
    flow = tame_flow(torch.float32, **RANGE)
    default, low = wanted(flow, SampleConfig()), wanted(flow, SampleConfig(noise=0.1))
    assert default.misfit(wanted(flow, SampleConfig(noise=0.5))) is None
    assert low.misfit(default) == "it was made for noise 0.1, not 0.5"
    fixed = wanted(tame_flow(torch.float32), SampleConfig())
    assert fixed.noise is None
    assert dataclasses.replace(fixed, noise=None) == fixed
