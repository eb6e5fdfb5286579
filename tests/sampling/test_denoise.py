"""Denoising against finite differences of the log-likelihood, in float64."""

import torch

from flowback.sampling.denoise import denoise, denoises, images_at_once
from reference import random_flow, random_images


def test_is_the_score_step():
    """x + σ²·∇ log p(x | label): central differences of step 1e-5, so 1e-8 of the step's size."""
    flow = random_flow(noise_std=0.3)
    images, labels = random_images(flow, 2), torch.tensor([1, 4])
    step = denoise(flow, images, labels) - images
    for image, label, moved in zip(images, labels, step, strict=True):
        for place in ((0, 0, 0), (0, 3, 5), (0, 7, 7)):
            delta = torch.zeros_like(image)
            delta[place] = 1e-5
            up, down = (flow.log_prob(x[None], [int(label)]) for x in (image + delta, image - delta))
            score = (up - down).item() / 2e-5
            assert abs(moved[place].item() - 0.09 * score) < 1e-6 * max(1, abs(score))


def test_depends_on_the_label():
    flow = random_flow()
    images = random_images(flow, 1)
    assert not torch.equal(denoise(flow, images, torch.tensor([0])), denoise(flow, images, torch.tensor([1])))


def test_chunks_change_nothing():
    """To rounding: sums in another order for another number of rows."""
    flow, labels = random_flow(), torch.arange(5)
    images = random_images(flow, 5)
    whole = denoise(flow, images, labels)
    torch.testing.assert_close(denoise(flow, images, labels, chunk=2), whole, atol=1e-12, rtol=0)
    assert images_at_once(flow) >= 5
    deep = random_flow(layers=(1, 3))
    assert images_at_once(deep) == images_at_once(flow)  # as many layers in all
    assert not whole.requires_grad


def test_models_of_uniform_noise_have_no_such_step():
    for flow in (random_flow(noise="uniform"), random_flow(noise_std=0.0)):
        images = random_images(flow, 2)
        assert not denoises(flow)
        assert denoise(flow, images) is images


def test_under_inference_mode():
    """Images and labels made there take part in no gradient; their copies do."""
    flow = random_flow()
    images, labels = random_images(flow, 2), torch.tensor([1, 4])
    weights = torch.eye(5, dtype=torch.float64)[labels]
    with torch.inference_mode():
        found = [denoise(flow, images.clone(), own.clone()) for own in (labels, weights)]
    assert torch.equal(found[0], denoise(flow, images, labels))
    torch.testing.assert_close(found[1], found[0], atol=1e-12, rtol=0)
