from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowback import Flow
from flowback.classification import classify
from flowback.config import ModelConfig
from flowback.data.image_set import MemoryImages
from flowback.errors import InputError
from flowback.evaluation.held_out import accuracy
from flowback.flow.likelihood import add_noise

CONFIG = ModelConfig(
    image_size=8, channels=1, patch_size=2, width=32, blocks=3, layers=2, head_dim=16, num_classes=10
)


def random_flow(classes: int = 10, **changes) -> Flow:
    """A flow that is no identity: every parameter random, as a trained one's."""
    flow = Flow(ModelConfig(**{**CONFIG.__dict__, "num_classes": classes, **changes}))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flow.eval()


def image_set(images: torch.Tensor, labels: torch.Tensor | None, classes: int = 10) -> MemoryImages:
    return MemoryImages("memory", tuple(map(str, range(classes))), labels, images)


def some_images(n: int = 6, dtype=torch.float32) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, dtype=dtype) * 2 - 1


def test_gradient_rule_is_the_closed_form_at_zero_logits():
    # At λ = 0: p_k · Σ_blocks (E_k − e) · ∂L/∂e_block, with e the unconditional embedding (method, Sec. 3).
    flow, images = random_flow().double(), some_images(4, torch.float64)
    embeddings = [block.class_table.mean(0).expand(4, -1).detach().requires_grad_() for block in flow.blocks]
    x, log_det = flow.tokens(images), 0.0
    for block, embedding in zip(flow.blocks, embeddings, strict=True):
        x, added, _ = block(x, embedding)
        log_det = log_det + added
    log_prob = log_det - 0.5 * x.square().sum(dim=(1, 2))
    slopes = torch.autograd.grad(log_prob.sum(), embeddings)
    expected = torch.zeros(4, 10, dtype=torch.float64)
    for block, slope in zip(flow.blocks, slopes, strict=True):
        expected += 0.1 * slope @ (block.class_table - block.class_table.mean(0)).T
    scores = classify(flow, images, noise=False)
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-10, atol=1e-10)


def test_normalised_rule_is_the_slope_for_each_unit_of_the_way():
    """By hand, the distance over all blocks; twice as long a way for a class changes no score of its own."""
    flow, images = random_flow(classes=3).double(), some_images(4, torch.float64)
    slopes, scores = (classify(flow, images, method, noise=False) for method in ("gradient", "normalised"))
    for k in range(3):
        ways = [block.class_table[k] - block.class_table.mean(0) for block in flow.blocks]
        distance = sum(float((way @ way).detach()) for way in ways) ** 0.5
        torch.testing.assert_close(scores[:, k], slopes[:, k] / distance, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for block in flow.blocks:  # the mean stays where it is, so all slopes are twice as steep
            block.class_table.add_(block.class_table - block.class_table.mean(0))
    assert torch.allclose(classify(flow, images, noise=False), 2 * slopes, rtol=1e-9)
    torch.testing.assert_close(
        classify(flow, images, "normalised", noise=False), scores, rtol=1e-9, atol=1e-9
    )


def test_a_class_without_a_way_has_no_infinite_score():
    flow = random_flow(classes=1)
    assert classify(flow, some_images(2), "normalised").isfinite().all()


def test_gradient_rule_equals_finite_differences():
    flow, images = random_flow().double(), some_images(2, torch.float64)
    step, difference = 1e-5, torch.zeros(2, 10, dtype=torch.float64)
    for k in range(10):
        ends = []
        for sign in (1, -1):
            logits = torch.zeros(2, 10, dtype=torch.float64)
            logits[:, k] = sign * step
            ends.append(flow.log_prob(images, logits.softmax(dim=-1)))
        difference[:, k] = ((ends[0] - ends[1]) / (2 * step)).detach()
    scores = classify(flow, images, noise=False)
    # central differences: truncation h² and rounding 1e-16 · |log p| / h, both below 1e-8 here
    torch.testing.assert_close(scores, difference, rtol=1e-6, atol=1e-7)


def test_gradient_scores_sum_to_zero():
    # softmax does not feel a constant added to all logits
    scores = classify(random_flow().double(), some_images(5, torch.float64))
    torch.testing.assert_close(scores.sum(dim=1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)


def test_exhaustive_rule_is_the_log_density_of_every_class():
    flow, images = random_flow(classes=300).double(), some_images(3, torch.float64)
    scores = classify(flow, images, method="exhaustive", noise=False)
    for k in (0, 84, 85, 299):  # 256 rows hold 85 classes of 3 images: both sides of a chunk's edge
        torch.testing.assert_close(scores[:, k], flow.log_prob(images, k).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["gradient", "exhaustive"])
def test_an_image_does_not_depend_on_the_others(method):
    flow, images = random_flow().double(), some_images(5, torch.float64)
    whole = classify(flow, images, method, draws=2)
    alone = torch.cat([classify(flow, images[i : i + 1], method, draws=2, seeds=[i]) for i in range(5)])
    torch.testing.assert_close(whole, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("noise", ["gaussian", "uniform"])
@pytest.mark.parametrize("method", ["gradient", "exhaustive"])
def test_draws_average_the_scores_of_the_models_own_noise(noise, method):
    flow, images = random_flow(noise=noise).double(), some_images(3, torch.float64)
    seeds = [5, 6, 7]
    noised = [add_noise(images, flow.config, seeds, draw) for draw in range(3)]
    mean = sum(classify(flow, x, method, noise=False) for x in noised) / 3
    torch.testing.assert_close(
        classify(flow, images, method, draws=3, seeds=seeds), mean, rtol=1e-10, atol=1e-10
    )
    assert (noised[0] != noised[1]).all()


def test_first_small_step_moves_along_the_gradient_and_more_steps_climb():
    flow, images = random_flow().double(), some_images(4, torch.float64)
    rise = classify(flow, images, noise=False)
    logits = classify(flow, images, noise=False, steps=2, step_size=1e-6)
    torch.testing.assert_close(logits, 2e-6 * rise, rtol=1e-3, atol=1e-12)

    def log_prob(steps):
        logits = classify(flow, images, noise=False, steps=steps, step_size=0.05)
        return flow.log_prob(images, logits.softmax(dim=-1))

    assert (log_prob(8) > log_prob(2)).all()


def test_nothing_is_left_behind_and_no_parameter_gets_a_gradient():
    flow, images = random_flow(), some_images()
    before = images.clone()
    with torch.no_grad():  # as a caller in an evaluation loop has it
        scores = classify(flow, images)
    assert not scores.requires_grad
    assert torch.equal(images, before)
    assert all(p.grad is None and p.requires_grad for p in flow.parameters())


def test_cost_does_not_grow_with_the_classes():
    """1000 classes add their product with the class tables, forward and backward, to the work for 10."""
    images, operations = some_images(16), {}
    for classes in (10, 1000):
        flow = random_flow(classes, width=64)
        with FlopCounterMode(display=False) as counter:
            classify(flow, images)
        operations[classes] = counter.get_total_flops()
    tables = 2 * 16 * 990 * 64 * flow.config.blocks  # multiply and add: images, classes, width
    assert operations[1000] - operations[10] == 2 * tables


def test_accuracy_counts_ranks_and_confusion():
    flow = random_flow()
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    scores = classify(flow, images.float() / 127.5 - 1, seeds=range(3, 53))
    order = scores.argsort(dim=1, descending=True)
    labels = order[:, 0].clone()
    labels[:10] = order[:10, 4]  # right among five, not first
    labels[10:15] = order[10:15, 5]  # wrong in both
    result = accuracy(flow, image_set(images, labels), batch_size=7, seed=3)
    assert (result.images, result.top1, result.top5, result.nonfinite) == (50, 0.7, 0.9, 0)
    assert result.confusion.sum() == 50
    assert result.confusion.diagonal().sum() == 35
    assert result.confusion[labels[0], order[0, 0]] >= 1
    assert torch.equal(result.confusion.sum(dim=1), labels.bincount(minlength=10))
    assert result.images_per_second > 0


def test_shares_of_the_images_add_up():
    flow = random_flow()
    labels = torch.arange(13) % 10
    images = image_set(torch.randint(0, 256, (13, 1, 8, 8), dtype=torch.uint8), labels)
    whole = accuracy(flow, images, limit=11, batch_size=4)
    parts = [accuracy(flow, images, limit=11, batch_size=4, share=(r, 3)) for r in range(3)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert [part.images for part in parts] == [4, 4, 3]
    assert torch.equal(merged.confusion, whole.confusion)
    assert (merged.images, merged.top1, merged.top5) == (11, whole.top1, whole.top5)
    assert merged.seconds == max(part.seconds for part in parts)


def test_accuracy_takes_an_even_subset():
    flow = random_flow()
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(10).repeat_interleave(4)
    result = accuracy(flow, image_set(images, labels), limit=10)
    assert result.confusion.sum(dim=1).tolist() == [1] * 10


def test_scores_that_are_not_finite_count_as_wrong():
    flow = random_flow()
    with torch.no_grad():
        flow.blocks[0].class_table[3] = torch.nan
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    result = accuracy(flow, image_set(images, torch.zeros(4, dtype=torch.int64)))
    assert (result.nonfinite, result.top1, int(result.confusion.sum())) == (4, 0.0, 0)


def test_bad_input():
    flow, images, pixels = random_flow(), some_images(2), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(InputError, match="unconditional"):
        classify(random_flow(classes=0), images)
    with pytest.raises(InputError, match="at least 1"):
        classify(flow, images, draws=0)
    with pytest.raises(InputError, match="one seed per image"):
        classify(flow, images, seeds=[1])
    with pytest.raises(InputError, match="shape"):
        classify(flow, some_images(2)[..., :4])
    with pytest.raises(InputError, match="no labels"):
        accuracy(flow, image_set(pixels, None))
    with pytest.raises(InputError, match="12 classes, the model 10"):
        accuracy(flow, image_set(pixels, torch.tensor([0, 1]), classes=12))


@pytest.mark.parametrize("method", ["gradient", "exhaustive"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_classify_works_inside_inference_mode(method, position):
    torch.manual_seed(0)
    expected = classify(random_flow(position=position), some_images(), method)
    torch.manual_seed(0)
    with torch.inference_mode():  # the weights and the images are inference tensors, too
        found = classify(random_flow(position=position), some_images(), method)
    torch.testing.assert_close(found, expected)


def ranged_flow():
    return random_flow(noise="range", noise_min=0.05, noise_max=0.5).double()


def test_rules_at_a_noise_level():
    """Noise and condition have the level: the exhaustive scores are the densities, the slopes autograd's."""
    flow, images, seeds = ranged_flow(), some_images(3, torch.float64), [3, 4, 5]
    noised = flow.add_noise(images, seeds, noise=0.2)
    densities = [flow.log_prob(noised, k, noise=0.2).detach() for k in range(10)]
    found = classify(flow, images, "exhaustive", 0.2, seeds=seeds)
    torch.testing.assert_close(found, torch.stack(densities, dim=1), atol=1e-10, rtol=0)
    logits = torch.zeros(3, 10, dtype=torch.float64, requires_grad=True)
    log_prob = flow(noised, logits.softmax(1), noise=torch.full((3,), 0.2, dtype=torch.float64)).log_prob
    (slopes,) = torch.autograd.grad(log_prob.sum(), logits)
    torch.testing.assert_close(classify(flow, images, noise=0.2, seeds=seeds), slopes, atol=1e-10, rtol=0)


def test_the_level_where_none_is_named():
    flow, images = ranged_flow(), some_images(2, torch.float64)
    middle = (0.05 * 0.5) ** 0.5
    assert torch.equal(classify(flow, images), classify(flow, images, noise=middle))
    lowest = [flow.log_prob(images, k, noise=0.05).detach() for k in range(10)]
    found = classify(flow, images, "exhaustive", noise=False)
    torch.testing.assert_close(found, torch.stack(lowest, dim=1), atol=1e-10, rtol=0)
    with pytest.raises(InputError, match=r"0\.6 is outside the range that the flow is trained on, 0.05 to"):
        classify(flow, images, noise=0.6)
    with pytest.raises(InputError, match=r"0\.3 is not that of this flow"):
        classify(random_flow(noise_std=0.1), some_images(2), noise=0.3)


@pytest.mark.parametrize("method", ["gradient", "normalised", "exhaustive"])
def test_several_levels_average_their_scores(method):
    """The noise of a seed is the same at all of them; to 1e-12, another order of sums."""
    flow, images, seeds = ranged_flow(), some_images(3, torch.float64), [3, 4, 5]
    each = [classify(flow, images, method, level, seeds=seeds) for level in (0.1, 0.2, 0.4)]
    found = classify(flow, images, method, (0.1, 0.2, 0.4), seeds=seeds)
    torch.testing.assert_close(found, torch.stack(each).mean(0), atol=1e-12, rtol=0)
    assert not torch.allclose(found, each[0])
